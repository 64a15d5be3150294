# Leaves out of llama.cpp what only its own programs use, more than half of the time that it takes to compile.
# Included by -DCMAKE_PROJECT_llama.cpp_INCLUDE=FILE after llama.cpp's project(): a variable goes before an option.
set(LLAMA_BUILD_COMMON OFF)
