#include <cstring>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "train.h"

namespace mbv2::cpu::train {

const Kernels& kernels(const char* name) {
    const char* chosen = cpu::kernels(name).name;
    for (const Kernels* kernels : {avx512_kernels(), avx2_kernels(), portable_kernels()}) {
        if (kernels != nullptr && std::strcmp(kernels->name, chosen) == 0) return *kernels;
    }
    throw std::runtime_error("this build has no training kernels for " + std::string(chosen));
}

}  // namespace mbv2::cpu::train
