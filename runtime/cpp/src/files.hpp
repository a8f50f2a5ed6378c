// Files of a bundle: read by descriptor, hashed, and known again later. Errors say whether the file or the machine is at
// fault.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "error.hpp"

namespace tarflow::internal {

// What a file was when it was looked at. Another file at its path, or other bytes in it, make another identity.
struct Identity {
  dev_t device;
  ino_t inode;
  std::uint64_t size;
  std::int64_t seconds, nanoseconds;  // of its last change

  bool operator==(const Identity& other) const;
};

// Of whatever is at a path, links followed. Throws as File.
Identity identity_of(const std::string& path);

// What the system said of a path: Error(TARFLOW_MACHINE) where a limit was reached, else Error(TARFLOW_BUNDLE).
Error unreadable(const std::string& path, int code);

// A regular file, open for reading.
class File {
 public:
  explicit File(std::string path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // The next bytes, fewer only at the end.
  std::size_t read(char* to, std::size_t size);
  std::string read(std::size_t size);
  void skip_to(std::uint64_t offset);

  // Throws Error(TARFLOW_BUNDLE) if it was written to since it was opened. Another file at its path is none of its.
  void require_unchanged() const;

  const std::string path;

 private:
  friend class Mapping;
  const int descriptor_;

 public:
  const Identity identity;
};

// A file's bytes in memory, read when they are looked at, for as long as this lives.
class Mapping {
 public:
  // Throws Error(TARFLOW_MACHINE) if there is no room for it.
  explicit Mapping(const File& file);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  const std::size_t size_;
  void* data_;
};

// SHA-256 in lower-case hexadecimal, of what is left of a file and of bytes.
std::string sha256(File& file);
std::string sha256(std::string_view content);

}  // namespace tarflow::internal
