"""What everything else stands on: errors, checks of arguments, arrays, text, progress."""
