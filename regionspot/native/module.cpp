// The Python face of the native code: conversions and the release of the GIL, nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "level.hpp"
#include "linear.hpp"
#include "mask_logits.hpp"
#include "resize.hpp"
#include "rle.hpp"
#include "token_decoder.hpp"

namespace nb = nanobind;

namespace {

using MaskArray = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::device::cpu>;
using DecodedMask = nb::ndarray<nb::numpy, bool, nb::ndim<2>>;

std::uint64_t pixel_count(std::uint64_t height, std::uint64_t width) {
    constexpr std::uint64_t kMaxPixels = 0xFFFFFFFF;  // the COCO API keeps runs in 32 bits
    if (height != 0 && width > kMaxPixels / height) throw std::invalid_argument("the size has more than 2^32 - 1 pixels");
    return height * width;
}

std::string rle_encode(const MaskArray& mask) {
    const regionspot::MaskView view{mask.data(), mask.shape(0), mask.shape(1), static_cast<std::ptrdiff_t>(mask.stride(0)),
                                    static_cast<std::ptrdiff_t>(mask.stride(1))};
    nb::gil_scoped_release release;
    return regionspot::text_from_runs(regionspot::runs_from_mask(view));
}

DecodedMask rle_decode(std::string_view text, std::uint64_t height, std::uint64_t width) {
    std::unique_ptr<std::vector<std::uint8_t>> mask;
    {
        nb::gil_scoped_release release;
        const std::uint64_t pixels = pixel_count(height, width);
        const regionspot::Runs runs = regionspot::runs_from_text(text, pixels);  // before anything large is allocated
        mask = std::make_unique<std::vector<std::uint8_t>>(regionspot::mask_from_runs(runs, pixels));
    }
    void* const data = mask->data();
    nb::capsule owner(mask.get(), [](void* pointer) noexcept { delete static_cast<std::vector<std::uint8_t>*>(pointer); });
    static_cast<void>(mask.release());
    return DecodedMask(data, {height, width}, owner, {1, static_cast<std::int64_t>(height)});
}

using LogitArray = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Size = std::array<std::size_t, 2>;

// (counts, areas, boxes) of the masks; sizes are checked in Python.
nb::tuple masks_from_logits(const LogitArray& logits, std::size_t frame, const Size& valid, const Size& picture,
                            std::size_t threads) {
    std::vector<regionspot::LogitMask> masks;
    {
        nb::gil_scoped_release release;
        const regionspot::MaskFrame sizes{{logits.shape(1), logits.shape(2)}, frame, valid, picture};
        masks = regionspot::masks_from_logits(logits.data(), logits.shape(0), sizes, threads);
    }
    nb::list counts, areas, boxes;
    for (const regionspot::LogitMask& mask : masks) {
        counts.append(mask.counts);
        areas.append(mask.area);
        boxes.append(nb::make_tuple(mask.box[0], mask.box[1], mask.box[2], mask.box[3]));
    }
    return nb::make_tuple(counts, areas, boxes);
}

template <typename Byte>
using RgbArray = nb::ndarray<Byte, nb::shape<-1, -1, 3>, nb::device::cpu>;

// A RgbSource or a RgbTarget.
template <typename View, typename Byte>
View rgb_view(const RgbArray<Byte>& array) {
    const std::size_t height = array.shape(0), width = array.shape(1);
    if (array.stride(2) != 1 || (width != 1 && array.stride(1) != 3)) {
        throw std::invalid_argument("the bytes of a row of pixels must lie side by side");
    }
    return {array.data(), height, width, static_cast<std::ptrdiff_t>(array.stride(0))};
}

void resize_rgb(const RgbArray<const std::uint8_t>& image, const std::vector<RgbArray<std::uint8_t>>& targets,
                std::size_t threads) {
    const auto source = rgb_view<regionspot::RgbSource>(image);
    std::vector<regionspot::RgbTarget> views;
    for (const auto& target : targets) views.push_back(rgb_view<regionspot::RgbTarget>(target));
    nb::gil_scoped_release release;
    regionspot::resize_rgb(source, views, threads);
}

template <std::size_t Axes, typename Number = const float>
using ArrayOf = nb::ndarray<Number, nb::ndim<Axes>, nb::c_contig, nb::device::cpu>;
// Shapes are checked where the operation is put into a graph.
void grid_attention(const ArrayOf<4>& projected, const ArrayOf<1>& padding, const ArrayOf<3>& relative_rows,
                    const ArrayOf<3>& relative_columns, const ArrayOf<4, float>& output, const Size& worked,
                    std::size_t threads) {
    const std::size_t channels = relative_rows.shape(1);
    nb::gil_scoped_release release;
    regionspot::grid_attention(
        {projected.shape(0), projected.shape(1), projected.shape(2), output.shape(3) / channels, channels,
         relative_rows.shape(0), relative_columns.shape(0), 1.0F / std::sqrt(static_cast<float>(channels)),
         projected.data(), padding.data(), relative_rows.data(), relative_columns.data(), output.data(),
         worked[0], worked[1]},
        threads);
}

std::unique_ptr<regionspot::LinearLayer> linear_layer(const ArrayOf<2>& weight, const ArrayOf<1>& bias,
                                                      regionspot::Activation activation) {
    if (bias.shape(0) != weight.shape(1)) throw std::invalid_argument("a linear layer's bias does not fit its weight");
    nb::gil_scoped_release release;
    return std::make_unique<regionspot::LinearLayer>(weight.data(), bias.data(), weight.shape(0), weight.shape(1), activation);
}

void apply_linear(const regionspot::LinearLayer& layer, const ArrayOf<2>& x, const ArrayOf<2, float>& y, std::size_t threads) {
    if (x.shape(1) != layer.inputs() || y.shape(1) != layer.outputs() || x.shape(0) != y.shape(0)) {
        throw std::invalid_argument("a linear layer's input or output has another shape");
    }
    nb::gil_scoped_release release;
    layer.apply(x.data(), x.shape(0), y.data(), threads);
}

using Array = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
std::unique_ptr<regionspot::TokenDecoder> token_decoder(const std::map<std::string, Array>& weights) {
    return std::make_unique<regionspot::TokenDecoder>([&](const std::string& name) {
        const auto found = weights.find(name);
        if (found == weights.end()) throw std::invalid_argument(name + " is missing");
        const Array& array = found->second;
        if (array.ndim() != 1 && array.ndim() != 2) throw std::invalid_argument(name + " has too many axes");
        return regionspot::Tensor{array.data(), array.ndim() == 2 ? array.shape(0) : 1, array.shape(array.ndim() - 1)};
    });
}

// Of one image; shapes are checked in Python, as in `decode`.
regionspot::TokenDecoder::Image pack(const regionspot::TokenDecoder& decoder, const ArrayOf<3>& projections,
                                     const ArrayOf<2>& statistics, const std::optional<ArrayOf<3>>& embedding,
                                     std::size_t threads) {
    nb::gil_scoped_release release;
    return decoder.pack(projections.data(), statistics.data(), embedding ? embedding->data() : nullptr, threads);
}

void decode(const regionspot::TokenDecoder& decoder, const regionspot::TokenDecoder::Image& image,
            const ArrayOf<3>& prompts, const std::vector<std::size_t>& wanted, std::size_t width,
            const std::array<std::size_t, 2>& drawn, const ArrayOf<3, float>& tokens,
            const ArrayOf<2, float>& iou_predictions, const std::optional<ArrayOf<4, float>>& masks, std::size_t threads) {
    nb::gil_scoped_release release;
    decoder.decode(image,
                   {prompts.data(), prompts.shape(0), prompts.shape(1), wanted, width, drawn[0], drawn[1],
                    tokens.data(), iou_predictions.data(), masks ? masks->data() : nullptr},
                   threads);
}

std::uint64_t rle_area(std::string_view text, std::uint64_t height, std::uint64_t width) {
    nb::gil_scoped_release release;
    return regionspot::area(regionspot::runs_from_text(text, pixel_count(height, width)));
}

}  // namespace

NB_MODULE(_native, module) {
    nb::set_leak_warnings(false);  // what lives as long as the process has not leaked
    module.doc() = "The native parts of regionspot.masks, regionspot.transforms and regionspot.runtime: use those.";
    module.attr("HIGHEST_LEVEL") = regionspot::kHighestLevel;
    module.def("level", &regionspot::best_level);
    module.def("rle_encode", &rle_encode, nb::arg("mask").noconvert());
    module.def("rle_decode", &rle_decode, nb::arg("counts"), nb::arg("height"), nb::arg("width"));
    module.def("masks_from_logits", &masks_from_logits, nb::arg("logits").noconvert(), nb::arg("frame"), nb::arg("valid"),
               nb::arg("picture"), nb::arg("threads"));
    module.def("resize_rgb", &resize_rgb, nb::arg("image").noconvert(), nb::arg("targets").noconvert(), nb::arg("threads"));
    module.def("grid_attention", &grid_attention, nb::arg("projected").noconvert(), nb::arg("padding").noconvert(),
               nb::arg("relative_rows").noconvert(), nb::arg("relative_columns").noconvert(),
               nb::arg("output").noconvert(), nb::arg("worked"), nb::arg("threads"));
    nb::enum_<regionspot::Activation>(module, "Activation")
        .value("NONE", regionspot::Activation::kNone)
        .value("GELU", regionspot::Activation::kGelu)
        .value("QUICK_GELU", regionspot::Activation::kQuickGelu);
    nb::class_<regionspot::LinearLayer>(module, "LinearLayer")
        .def(nb::new_(&linear_layer), nb::arg("weight").noconvert(), nb::arg("bias").noconvert(),
             nb::arg("activation") = regionspot::Activation::kNone)
        .def_prop_ro_static("lanes", [](nb::handle) { return regionspot::LinearLayer::lanes(); })
        .def("apply", &apply_linear, nb::arg("x").noconvert(), nb::arg("y").noconvert(), nb::arg("threads"));
    nb::class_<regionspot::TokenDecoder::Image>(module, "PackedImage");
    nb::class_<regionspot::TokenDecoder>(module, "TokenDecoder")
        .def(nb::new_(&token_decoder), nb::arg("weights"))
        .def_prop_ro("channels", &regionspot::TokenDecoder::channels)
        .def_prop_ro("cells", &regionspot::TokenDecoder::cells)
        .def("pack", &pack, nb::arg("projections").noconvert(), nb::arg("statistics").noconvert(),
             nb::arg("embedding").noconvert().none(), nb::arg("threads"))
        .def("decode", &decode, nb::arg("image"), nb::arg("prompts").noconvert(), nb::arg("wanted"), nb::arg("width"),
             nb::arg("drawn"), nb::arg("tokens").noconvert(), nb::arg("iou_predictions").noconvert(),
             nb::arg("masks").noconvert().none(), nb::arg("threads"));
    module.def("rle_area", &rle_area, nb::arg("counts"), nb::arg("height"), nb::arg("width"));
}
