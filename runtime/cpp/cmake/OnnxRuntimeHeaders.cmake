# Sets ONNXRUNTIME_INCLUDE_DIR, the folder of onnxruntime_c_api.h: from ONNXRUNTIME_ROOT, or an installed package.
set(suffixes include include/onnxruntime include/onnxruntime/core/session usr/include/onnxruntime
             usr/include/onnxruntime/core/session)
if(ONNXRUNTIME_ROOT)
  find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h PATHS ${ONNXRUNTIME_ROOT} PATH_SUFFIXES ${suffixes}
            NO_DEFAULT_PATH)
else()
  find_package(onnxruntime CONFIG QUIET)
  if(onnxruntime_FOUND)
    get_target_property(folders onnxruntime::onnxruntime INTERFACE_INCLUDE_DIRECTORIES)
  endif()
  find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h HINTS ${folders} PATH_SUFFIXES ${suffixes})
endif()
if(NOT ONNXRUNTIME_INCLUDE_DIR)
  message(FATAL_ERROR "ONNX Runtime's header onnxruntime_c_api.h was not found; expected 1.21 or newer. Install "
          "libonnxruntime-dev, or run cmake/onnxruntime-headers.sh FOLDER and pass -DONNXRUNTIME_ROOT=FOLDER")
endif()
file(STRINGS ${ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_c_api.h line REGEX "^#define ORT_API_VERSION ")
string(REGEX MATCH "[0-9]+" ONNXRUNTIME_API "${line}")
if(ONNXRUNTIME_API LESS 21)
  message(FATAL_ERROR "ONNX Runtime's headers in ${ONNXRUNTIME_INCLUDE_DIR} are of 1.${ONNXRUNTIME_API}; expected 1.21 or newer")
endif()
message(STATUS "ONNX Runtime headers: 1.${ONNXRUNTIME_API} in ${ONNXRUNTIME_INCLUDE_DIR}")
