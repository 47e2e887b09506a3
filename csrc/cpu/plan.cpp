#include <stdexcept>
#include <string>

#include "network.h"

namespace mbv2::cpu {

Plan::Plan(const int64_t* numbers, int64_t count) {
    const int64_t given = (count - 2) / 5;
    if (count < 7 || count != 2 + 5 * given || given > kMostBlocks) {
        throw std::invalid_argument("a plan of " + std::to_string(count) + " numbers describes no network");
    }
    classes = numbers[0];
    last_channels = numbers[1];
    block_count = given;
    bool right = classes > 0 && last_channels > 0;
    for (int64_t i = 0; i < given; ++i) {
        const int64_t* block = numbers + 2 + 5 * i;
        blocks[i] = {block[0], block[1], block[2], block[3], block[4] != 0};
        const int64_t inputs = i == 0 ? block[1] : blocks[i - 1].outputs;
        right = right && block[0] == inputs && block[0] > 0 && block[1] > 0 && block[2] > 0;
        right = right && (block[3] == 1 || block[3] == 2);
        right = right && (block[4] == 0 || (block[0] == block[2] && block[3] == 1));
    }
    if (!right) throw std::invalid_argument("the plan's blocks do not follow from one another");
}

}  // namespace mbv2::cpu
