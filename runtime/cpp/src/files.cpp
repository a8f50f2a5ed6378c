#include "files.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <vector>

namespace tarflow::internal {
namespace {

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) failed();
  }

  void add(const char* data, std::size_t size) {
    if (EVP_DigestUpdate(context_.get(), data, size) != 1) failed();
  }

  std::string hex() {
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    unsigned int size = 0;
    if (EVP_DigestFinal_ex(context_.get(), digest.data(), &size) != 1) failed();
    std::string text;
    for (unsigned int i = 0; i < size; ++i) {
      text += "0123456789abcdef"[digest[i] >> 4];
      text += "0123456789abcdef"[digest[i] & 15];
    }
    return text;
  }

 private:
  [[noreturn]] static void failed() { throw machine_error("OpenSSL cannot compute SHA-256 on this machine"); }

  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

Identity identity_of(const struct stat& status) {
  return {status.st_dev, status.st_ino, static_cast<std::uint64_t>(status.st_size), status.st_mtim.tv_sec,
          status.st_mtim.tv_nsec};
}

int opened(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw unreadable(path, errno);
  return descriptor;
}

Identity identity_of(const std::string& path, int descriptor) {
  struct stat status {};
  if (fstat(descriptor, &status) == 0) return identity_of(status);
  throw unreadable(path, errno);
}

}  // namespace

bool Identity::operator==(const Identity& other) const {
  return device == other.device && inode == other.inode && size == other.size && seconds == other.seconds &&
         nanoseconds == other.nanoseconds;
}

Identity identity_of(const std::string& path) {
  struct stat status {};
  if (stat(path.c_str(), &status) == 0) return identity_of(status);
  throw unreadable(path, errno);
}

Error unreadable(const std::string& path, int code) {
  const std::string said = "'" + path + "' cannot be read: " + std::strerror(code);
  if (code == EMFILE || code == ENFILE) {
    return machine_error(said + "; close files, or raise the limit on open ones");
  }
  if (code == ENOMEM || code == EAGAIN) return machine_error(said + "; free some memory, or raise its limit");
  return bundle_error(said);
}

File::File(std::string path)
    : path(std::move(path)), descriptor_(opened(this->path)), identity(identity_of(this->path, descriptor_)) {}

File::~File() { close(descriptor_); }

std::size_t File::read(char* to, std::size_t size) {
  std::size_t done = 0;
  while (done < size) {
    const ssize_t count = ::read(descriptor_, to + done, size - done);
    if (count == 0) break;
    if (count < 0 && errno != EINTR) throw unreadable(path, errno);
    if (count > 0) done += static_cast<std::size_t>(count);
  }
  return done;
}

std::string File::read(std::size_t size) {
  std::string content(size, '\0');
  content.resize(read(content.data(), size));
  return content;
}

void File::skip_to(std::uint64_t offset) {
  if (lseek(descriptor_, static_cast<off_t>(offset), SEEK_SET) < 0) throw unreadable(path, errno);
}

void File::require_unchanged() const {
  if (identity_of(path, descriptor_) == identity) return;
  throw bundle_error("'" + path + "' was changed after its hash was checked; open the bundle again");
}

Mapping::Mapping(const File& file)
    : size_(static_cast<std::size_t>(file.identity.size)),
      data_(mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.descriptor_, 0)) {
  if (data_ == MAP_FAILED) throw machine_error("'" + file.path + "' cannot be mapped: " + std::strerror(errno));
}

Mapping::~Mapping() { munmap(data_, size_); }

std::string sha256(File& file) {
  Sha256 hash;
  std::vector<char> chunk(1 << 20);
  for (std::size_t count; (count = file.read(chunk.data(), chunk.size())) > 0;) hash.add(chunk.data(), count);
  return hash.hex();
}

std::string sha256(std::string_view content) {
  Sha256 hash;
  hash.add(content.data(), content.size());
  return hash.hex();
}

}  // namespace tarflow::internal
