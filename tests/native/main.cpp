#include "check.h"
#include "levels.h"

// All tests at every level of instructions that the processor has.
int main() {
  for (const pbe::Level level : {pbe::Level::clones, pbe::Level::avx512, pbe::Level::vbmi, pbe::Level::bf16}) {
    if (pbe::limit_level(level) != level) break;
    for (const Test& test : tests()) {
      std::printf("level %d: %s\n", static_cast<int>(level), test.name);
      std::fflush(stdout);
      test.run();
    }
  }
  std::printf("%zu native tests passed\n", tests().size());
}
