#include "rle.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace regionspot {
namespace {

constexpr std::size_t kTileColumns = 64;  // a cache line of a row-major mask
constexpr std::uint8_t kFirstCharacter = '0';
constexpr std::uint8_t kMoreGroups = 0x20;
constexpr std::uint8_t kSignBit = 0x10;
constexpr unsigned kGroupBits = 5;
constexpr unsigned kMaxShift = 60;  // 13 groups hold any 64-bit difference
constexpr std::size_t kMaxCharacters = kMaxShift / kGroupBits + 1;
constexpr std::int64_t kInOneGroup = 1 << (kGroupBits - 1), kInTwoGroups = 1 << (2 * kGroupBits - 1);

// Copies columns [first, first + count) of the mask into `tile`, one column after the other, as 0 and 1.
// Row by row, so that a row-major mask is read in the order it lies in memory.
void gather_columns(const MaskView& mask, std::size_t first, std::size_t count, std::vector<std::uint8_t>& tile) {
    for (std::size_t row = 0; row < mask.height; ++row) {
        const std::uint8_t* pixel = mask.data + static_cast<std::ptrdiff_t>(row) * mask.row_stride +
                                    static_cast<std::ptrdiff_t>(first) * mask.column_stride;
        for (std::size_t column = 0; column < count; ++column, pixel += mask.column_stride) {
            tile[column * mask.height + row] = *pixel != 0;
        }
    }
}

// The first position in [begin, end) whose value is not `value`, eight bytes at a time while they all are.
const std::uint8_t* skip_run(const std::uint8_t* begin, const std::uint8_t* end, std::uint8_t value) {
    const std::uint64_t same = value * 0x0101010101010101ULL;
    while (end - begin >= 8) {
        std::uint64_t word;
        std::memcpy(&word, begin, sizeof word);
        if (word != same) break;
        begin += 8;
    }
    return std::find_if(begin, end, [value](std::uint8_t pixel) { return pixel != value; });
}

// Reads one signed number at `position` and moves past it.
std::int64_t read_number(std::string_view text, std::size_t& position) {
    std::uint64_t bits = 0;
    for (unsigned shift = 0;; shift += kGroupBits) {
        if (position == text.size()) throw std::invalid_argument("the text ends in the middle of a number");
        const auto group = static_cast<std::uint8_t>(static_cast<std::uint8_t>(text[position++]) - kFirstCharacter);
        if (group >= 2 * kMoreGroups) throw std::invalid_argument("the text holds a character outside '0' to 'o'");
        if (shift > kMaxShift) throw std::invalid_argument("the text holds a number of more than 64 bits");
        bits |= static_cast<std::uint64_t>(group & (kMoreGroups - 1)) << shift;
        if (group & kMoreGroups) continue;
        if ((group & kSignBit) && shift + kGroupBits < 64) bits |= ~std::uint64_t{0} << (shift + kGroupBits);
        return static_cast<std::int64_t>(bits);
    }
}

}  // namespace

Runs runs_from_mask(const MaskView& mask) {
    Runs runs;
    std::vector<std::uint8_t> tile(std::min(mask.width, kTileColumns) * mask.height);
    std::uint8_t value = 0;
    std::uint64_t length = 0;
    for (std::size_t first = 0; first < mask.width; first += kTileColumns) {
        const std::size_t columns = std::min(kTileColumns, mask.width - first);
        gather_columns(mask, first, columns, tile);
        const std::uint8_t* position = tile.data();
        const std::uint8_t* const end = position + columns * mask.height;
        while (position != end) {
            const std::uint8_t* const next = skip_run(position, end, value);
            length += static_cast<std::uint64_t>(next - position);
            position = next;
            if (position == end) break;  // the run may go on in the next tile
            runs.push_back(length);
            length = 0;
            value ^= 1;
        }
    }
    runs.push_back(length);
    return runs;
}

std::string text_from_runs(const Runs& runs) {
    std::string text(2 * runs.size() + kMaxCharacters, '\0');
    std::size_t length = 0;
    for (std::size_t i = 0; i < runs.size(); ++i) {
        auto number = static_cast<std::int64_t>(runs[i]);
        if (i > 2) number -= static_cast<std::int64_t>(runs[i - 2]);
        if (text.size() < length + kMaxCharacters) text.resize(2 * text.size());
        char* const to = text.data() + length;
        if (number >= -kInTwoGroups && number < kInTwoGroups) {  // nearly all, and without a branch that is hard to foresee
            const bool more = number < -kInOneGroup || number >= kInOneGroup;
            to[0] = static_cast<char>((number & (kMoreGroups - 1)) + (more ? kMoreGroups : 0) + kFirstCharacter);
            to[1] = static_cast<char>((number >> kGroupBits & (kMoreGroups - 1)) + kFirstCharacter);
            length += 1 + static_cast<std::size_t>(more);
            continue;
        }
        for (bool more = true; more;) {
            auto group = static_cast<std::uint8_t>(number & (kMoreGroups - 1));
            number >>= kGroupBits;  // arithmetic since C++20: the sign stays
            more = number != ((group & kSignBit) ? -1 : 0);
            if (more) group |= kMoreGroups;
            text[length++] = static_cast<char>(group + kFirstCharacter);
        }
    }
    text.resize(length);
    return text;
}

Runs runs_from_text(std::string_view text, std::uint64_t pixels) {
    Runs runs;
    std::uint64_t total = 0;
    for (std::size_t position = 0; position < text.size();) {
        const std::int64_t number = read_number(text, position);
        // Unsigned, so that a foreign difference wraps and is then refused as too long, instead of overflowing.
        const std::uint64_t before = runs.size() > 2 ? runs[runs.size() - 2] : 0;
        const std::uint64_t run = static_cast<std::uint64_t>(number) + before;
        if (run > pixels - total) throw std::invalid_argument("the runs are negative or cover more pixels than the mask has");
        total += run;
        runs.push_back(run);
    }
    if (total != pixels) throw std::invalid_argument("the runs cover fewer pixels than the mask has");
    return runs;
}

std::vector<std::uint8_t> mask_from_runs(const Runs& runs, std::size_t pixels) {
    std::vector<std::uint8_t> mask(pixels);
    std::size_t position = 0;
    for (std::size_t i = 0; i < runs.size(); ++i) {
        const auto run = static_cast<std::size_t>(runs[i]);
        if (i % 2 == 1) std::fill_n(mask.begin() + static_cast<std::ptrdiff_t>(position), run, std::uint8_t{1});
        position += run;
    }
    return mask;
}

std::uint64_t area(const Runs& runs) noexcept {
    std::uint64_t total = 0;
    for (std::size_t i = 1; i < runs.size(); i += 2) total += runs[i];
    return total;
}

}  // namespace regionspot
