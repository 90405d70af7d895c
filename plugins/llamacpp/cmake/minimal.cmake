# Compile only what engineroom-llamacpp uses of llama.cpp.
#
# llama.cpp's "common" library serves its command-line tools; the Python bindings use none of it,
# yet the build of llama-cpp-python switches it on by force. Leaving it and the multimodal
# library out brings the build on two cores from twelve minutes to three. CMake includes this
# file when llama.cpp's own project() runs, which is after the bindings' build has spoken:
#
#   CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=/absolute/path/of/this/file" \
#     pip install llama-cpp-python
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "llama.cpp: common library (unused by the Python bindings)" FORCE)
