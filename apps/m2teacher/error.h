#pragma once

#include <stdexcept>

namespace m2teacher {

/// Something that the user can put right: bad data, a bad checkpoint, a folder that cannot be written.
/// `what()` is one line that names the thing, what was found and what is expected.
class UserError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A file that the system does not let us read: whether it is whole is not known.
class ReadError : public UserError {
 public:
  using UserError::UserError;
};

}  // namespace m2teacher
