// A test is TEST(name) { ... CHECK(...); }. Buffers are exactly as large as the functions may touch, on the heap, so
// that AddressSanitizer sees the first byte beyond.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

#define TEST(name)                                                                   \
  static void test_##name();                                                         \
  static const bool added_##name = (tests().push_back({#name, &test_##name}), true); \
  static void test_##name()

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

template <class T>
std::unique_ptr<T[]> buffer(std::int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(n)]);
}

inline std::unique_ptr<float[]> uniform(std::int64_t n, float low, float high, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> draw(low, high);
  auto values = buffer<float>(n);
  for (std::int64_t i = 0; i < n; ++i) values[i] = draw(generator);
  return values;
}
