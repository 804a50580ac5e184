// Copies: torch-npu's own where bytes are moved as they are, the CPU's on aliases where they are converted or spread.
#pragma once

namespace cann_sim
{

// Replaces the operators that copy, and keeps torch-npu's kernel of copy_.
void carry_copies();

} // namespace cann_sim
