// What code built with -fsanitize=undefined calls when it meets undefined behaviour. In place of the
// compiler's run-time library, so that the launch fails with a message and the process lives on.
#pragma once
#include "scheduler.h"

namespace cusim {

// How the compiler describes a place and a type to the functions below. Every check's data starts with
// the place.
struct CheckedPlace {
  const char* file;
  uint32_t line, column;
};
struct CheckedType {
  uint16_t kind, information;
  char name[1];
};
struct TypeMismatch {
  CheckedPlace place;
  const CheckedType* type;
  unsigned char alignment_log2, access;
};
struct OutOfBounds {
  CheckedPlace place;
  const CheckedType *array_type, *index_type;
};

[[noreturn]] inline void undefined(const void* data, const char* what) {
  const auto& place = *static_cast<const CheckedPlace*>(data);
  const char* file = place.file ? place.file : "?";
  CUSIM_FAIL("undefined behaviour at %s:%u:%u: %s", file, place.line, place.column, what);
  __builtin_unreachable();
}

}  // namespace cusim

#define CUSIM_HANDLER extern "C" __attribute__((used, visibility("hidden"))) inline void
#define CUSIM_CHECK(name, what) \
  CUSIM_HANDLER __ubsan_handle_##name(void* data) { cusim::undefined(data, what); }
CUSIM_CHECK(add_overflow_abort, "signed integer overflow in +")
CUSIM_CHECK(sub_overflow_abort, "signed integer overflow in -")
CUSIM_CHECK(mul_overflow_abort, "signed integer overflow in *")
CUSIM_CHECK(negate_overflow_abort, "signed integer overflow in a negation")
CUSIM_CHECK(divrem_overflow_abort, "integer division by zero, or with a quotient that does not fit")
CUSIM_CHECK(shift_out_of_bounds_abort, "shift by a negative or too large number of bits")
CUSIM_CHECK(float_cast_overflow_abort, "conversion of a float to an integer type that cannot hold it")
CUSIM_CHECK(load_invalid_value_abort, "a bool or enum with a value that its type does not have")
CUSIM_CHECK(pointer_overflow_abort, "pointer arithmetic wraps around")
CUSIM_CHECK(vla_bound_not_positive_abort, "array with a size that is not positive")
CUSIM_CHECK(invalid_builtin_abort, "__builtin_ctz or __builtin_clz of zero")
CUSIM_CHECK(nonnull_arg_abort, "null pointer passed where none may be")
CUSIM_CHECK(builtin_unreachable, "__builtin_unreachable() was reached")
CUSIM_CHECK(missing_return, "a function's end without a return was reached")
#undef CUSIM_CHECK

CUSIM_HANDLER __ubsan_handle_out_of_bounds_abort(const cusim::OutOfBounds* data, long long index) {
  char what[160];
  std::snprintf(what, sizeof what, "index %lld is out of bounds of %s", index, data->array_type->name);
  cusim::undefined(data, what);
}

CUSIM_HANDLER __ubsan_handle_type_mismatch_v1_abort(const cusim::TypeMismatch* data, void* address) {
  char what[160];
  const unsigned long alignment = 1ul << data->alignment_log2;
  const char* type = data->type->name;
  if (!address)
    std::snprintf(what, sizeof what, "null pointer used as a %s", type);
  else if (reinterpret_cast<unsigned long>(address) % alignment)
    std::snprintf(what, sizeof what, "misaligned address %p for a %s, which needs %lu", address, type,
                  alignment);
  else
    std::snprintf(what, sizeof what, "address %p is out of the bounds of its object, as a %s", address, type);
  cusim::undefined(data, what);
}
