// Byte ranges as people and scripts write them: OFFSET:LENGTH.

package control

import (
	"fmt"
	"strings"
	"syscall"

	"blksnap/store"
)

// Range is a run of bytes.
type Range struct{ Offset, Length int64 }

// UnmarshalText reads OFFSET:LENGTH, each a size.
func (r *Range) UnmarshalText(text []byte) error {
	off, n, ok := strings.Cut(string(text), ":")
	if !ok {
		return fmt.Errorf("range %q is not OFFSET:LENGTH", clip(string(text)))
	}
	var err error
	if r.Offset, err = store.ParseSize(off); err != nil {
		return fmt.Errorf("offset of range: %w", err)
	}
	if r.Length, err = store.ParseSize(n); err != nil {
		return fmt.Errorf("length of range: %w", err)
	}
	return nil
}

// MarshalText writes what UnmarshalText reads.
func (r Range) MarshalText() ([]byte, error) {
	return fmt.Appendf(nil, "%d:%d", r.Offset, r.Length), nil
}

// check refuses a range that is empty or not inside a device of size bytes
// (EINVAL).
func (r Range) check(size int64) error {
	if r.Offset < 0 || r.Length <= 0 || r.Offset > size || r.Length > size-r.Offset {
		return refuse(syscall.EINVAL, "range %d:%d is not inside the device's %d bytes", r.Offset, r.Length, size)
	}
	return nil
}
