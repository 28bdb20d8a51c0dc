#include "convert.h"

#include <cmath>

#include "check.h"

using pbe::DType;

TEST(every_f16_and_bf16_survives_the_way_up_and_down) {
  constexpr std::int64_t n = 65536;
  auto halves = buffer<std::uint16_t>(n);
  auto wide = buffer<float>(n);
  auto back = buffer<std::uint16_t>(n);
  for (std::int64_t i = 0; i < n; ++i) halves[i] = static_cast<std::uint16_t>(i);
  for (const DType type : {DType::f16, DType::bf16}) {
    pbe::widen(halves.get(), type, wide.get(), n);
    pbe::narrow(wide.get(), back.get(), type, n);
    for (std::int64_t i = 0; i < n; ++i) {
      if (std::isnan(wide[i])) {
        auto again = buffer<float>(1);
        pbe::widen(&back[i], type, again.get(), 1);
        CHECK(std::isnan(again[0]));
      } else {
        CHECK(back[i] == halves[i]);
      }
    }
  }
}

TEST(narrow_rounds_to_nearest_even) {
  struct Case {
    DType type;
    float value;
    std::uint16_t bits;
  };
  for (const Case& c :
       {Case{DType::f16, 1.0f + 0x1p-11f, 0x3c00}, Case{DType::f16, 1.0f + 3 * 0x1p-11f, 0x3c02},
        Case{DType::f16, 65519.0f, 0x7bff}, Case{DType::f16, 65520.0f, 0x7c00}, Case{DType::f16, 0x1p-25f, 0x0000},
        Case{DType::f16, 3 * 0x1p-25f, 0x0002}, Case{DType::f16, -INFINITY, 0xfc00},
        Case{DType::bf16, 1.0f + 0x1p-8f, 0x3f80}, Case{DType::bf16, 1.0f + 3 * 0x1p-8f, 0x3f82},
        Case{DType::bf16, 3.4e38f, 0x7f80}, Case{DType::bf16, INFINITY, 0x7f80}}) {
    std::uint16_t bits = 0;
    pbe::narrow(&c.value, &bits, c.type, 1);
    CHECK(bits == c.bits);
  }
}

TEST(conversions_stay_inside_their_buffers) {
  for (const std::int64_t n : {0, 1, 3, 7, 15, 16, 17, 31, 33, 63, 1000}) {
    for (const DType type : {DType::f32, DType::f16, DType::bf16, DType::u8}) {
      auto in = buffer<std::uint8_t>(n * pbe::size_of(type));
      for (std::int64_t i = 0; i < n * pbe::size_of(type); ++i) in[i] = static_cast<std::uint8_t>(i % 60);
      auto wide = buffer<float>(n);
      pbe::widen(in.get(), type, wide.get(), n);
      if (type != DType::u8) pbe::narrow(wide.get(), in.get(), type, n);
    }
  }
}
