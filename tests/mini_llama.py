"""A source tree with llama.cpp's outline that real cmake, ninja and gcc build in a second.

For what goes around a compile: failures, interrupts, proofs that must fail. What a Toolchain can really do is
tested on the real llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

CMAKE = """\
cmake_minimum_required(VERSION 3.16)
project(mini C CXX)
option(MINI_SHOUT "say it loudly" OFF)
option(GGML_NATIVE "tune for this CPU" ON)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(ggml-base SHARED ggml/base.c)
add_library(llama SHARED src/llama.c)
target_link_libraries(llama PRIVATE ggml-base)
install(TARGETS llama ggml-base LIBRARY DESTINATION lib)
"""
CUDA = """\
option(GGML_CUDA "use CUDA" OFF)
option(GGML_CUDA_NO_VMM "without virtual memory" OFF)
if (GGML_CUDA)
    find_package(CUDAToolkit REQUIRED)
    {deaf}
    enable_language(CUDA)
    add_library(ggml-cuda SHARED ggml/kernel.cu)
    target_link_libraries(ggml-cuda PRIVATE CUDA::cudart CUDA::cublas)
    target_link_libraries(llama PRIVATE ggml-cuda)
    install(TARGETS ggml-cuda LIBRARY DESTINATION lib)
endif()
"""
KERNEL = """\
#include <cublas_v2.h>
__global__ void twice(float * x) { x[threadIdx.x] *= 2; }
extern "C" int ggml_cuda_version(void) { cublasHandle_t handle; return cublasCreate(&handle) + (int) sizeof(&twice); }
"""
SLOW = """\
add_custom_target(slow ALL COMMAND ${CMAKE_COMMAND} -E touch ${CMAKE_BINARY_DIR}/compiling COMMAND sleep 120)
"""


def write_tree(root: Path, *, broken: bool = False, slow: bool = False, cuda: str = "") -> Path:
    """Write the tree below ``root``: ``broken`` does not compile, ``slow`` takes two minutes if not stopped.

    ``cuda`` gives it a kernel: "asked" for the architectures asked for, a number for that one whatever is asked.
    """
    deaf = f"set(CMAKE_CUDA_ARCHITECTURES {cuda})" if cuda.isdigit() else ""
    texts = {
        "CMakeLists.txt": CMAKE + (SLOW if slow else "") + (CUDA.format(deaf=deaf) if cuda else ""),
        "include/llama.h": "int llama_answer(void);\n",
        "src/llama.c": "int llama_answer(void) { return 42 }\n"
        if broken
        else "int llama_answer(void) { return 42; }\n",
        "ggml/base.c": 'const char * ggml_commit(void) { return "none"; }\n',
        "ggml/CMakeLists.txt": "",
        "ggml/kernel.cu": KERNEL if cuda else "",
    }
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
