// The tile registers of AMX, as every product here lays them out.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fxq {

// What every tile register holds: 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileShapes TILE_SHAPES;

// Tiles that a thread may use as long as this lives.
class TileSession {
 public:
  TileSession() { _tile_loadconfig(&TILE_SHAPES); }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

}  // namespace fxq
