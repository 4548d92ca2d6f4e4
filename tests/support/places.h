// tests/support/places.h
//
// Where the tree and the build lie that a test belongs to.

#pragma once

namespace machina {

extern const char* const kSourceDir;
extern const char* const kBinary;         // build/<preset>/machina
extern const char* const kWallClockShim;  // "": this build has none

}  // namespace machina
