#include "parallel.h"

#include "check.h"

TEST(parallel_for_visits_every_index_once) {
  for (const std::int64_t n : {0, 1, 2, 63, 1000}) {
    for (const int threads : {-1, 1, 2, 3, 7}) {
      for (const std::int64_t grain : {0, 1, 64, 5000}) {
        std::vector<std::atomic<int>> visits(static_cast<std::size_t>(n));
        pbe::parallel_for(n, grain, threads, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i) ++visits[static_cast<std::size_t>(i)];
        });
        for (const auto& count : visits) CHECK(count == 1);
      }
    }
  }
}

TEST(parallel_for_works_nested_and_from_several_threads) {
  std::atomic<std::int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 200; ++repeat) {
        pbe::parallel_for(8, 1, 3, [&](std::int64_t begin, std::int64_t end) {
          pbe::parallel_for(end - begin, 1, 2, [&](std::int64_t first, std::int64_t last) { sum += last - first; });
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(sum == 4 * 200 * 8);
}
