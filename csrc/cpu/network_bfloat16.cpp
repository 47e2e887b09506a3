// The network in bfloat16.
#include "network_pack.h"
#include "network_run.h"

namespace mbv2::cpu {

template int64_t packed_size(const Plan&, const Kernels<Bfloat16>&);
template std::vector<int64_t> weight_sizes<Bfloat16>(const Plan&);
template void pack(const Plan&, const Kernels<Bfloat16>&, const float* const*, std::byte*);
template void run(const Plan&, const Kernels<Bfloat16>&, const std::byte*, const Image&, const Threads&, float*,
                  Times*);

}  // namespace mbv2::cpu
