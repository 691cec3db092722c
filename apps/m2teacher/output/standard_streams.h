#pragma once

namespace m2teacher {

/// Opens those of the descriptors 0 to 2 that are closed onto /dev/null: otherwise the next file that is opened would
/// take one of their numbers, and what is said to the user would land in it. From here on, standard output is flushed
/// by `standard_streams_arrived`.
void open_standard_streams();

/// Whether all that was written to standard output and standard error so far has arrived. Says so on whichever still
/// works, if not.
bool standard_streams_arrived();

/// Whether standard error is a terminal that knows escape sequences.
bool stderr_is_terminal();

}  // namespace m2teacher
