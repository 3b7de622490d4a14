// Errors that cross the boundary to the caller. Each maps to the class of the same name in
// turbosparse/errors.py. Text: "[place] expected ..., got ...".
#pragma once

#include <stdexcept>
#include <string>

namespace turbosparse {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class ModelFileError : public Error {
 public:
  using Error::Error;
};

class ConfigError : public Error {
 public:
  using Error::Error;
};

class ContextLengthError : public Error {
 public:
  using Error::Error;
};

class EngineError : public Error {
 public:
  using Error::Error;
};

/// Thrown out of a forward pass when its `should_stop` callback said so. The KV cache is rolled back.
class Interrupted : public Error {
 public:
  Interrupted() : Error("[engine] interrupted") {}
};

}  // namespace turbosparse
