// Memory that grows without moving: tables and change maps live in it.

package cow

import (
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// memory is a run of zeroed bytes that only grows and never moves, so that it
// can be read without a lock while it grows. Address space is reserved for all
// of it at once, which costs nothing; bytes are allocated as it grows, by system
// calls and before they are touched: when there is no memory, grow says so,
// instead of the process being killed at some later store.
type memory struct {
	reserved []byte
	n        atomic.Int64 // allocated bytes
}

// memoryStep is the unit in which memory grows.
const memoryStep = 64 << 10

// newMemory reserves address space for at least max bytes.
func newMemory(max int64) (*memory, error) {
	max = roundUp(max, memoryStep)
	b, err := unix.Mmap(-1, 0, int(max), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve %d bytes of address space: %w", max, err)
	}
	return &memory{reserved: b}, nil
}

// Bytes is all that was reserved; only the first Len bytes may be touched.
func (m *memory) Bytes() []byte { return m.reserved }

// Len is how many bytes may be touched.
func (m *memory) Len() int64 { return m.n.Load() }

// Grow allocates at least n more bytes. One caller at a time.
func (m *memory) Grow(n int64) error {
	from := m.n.Load()
	to := from + roundUp(n, memoryStep)
	if to > int64(len(m.reserved)) {
		return fmt.Errorf("grow tables to %d bytes: %w", to, unix.ENOSPC)
	}
	b := m.reserved[from:to]
	if err := unix.Mprotect(b, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return fmt.Errorf("grow tables to %d bytes: %w", to, err)
	}
	// Older kernels do not know the advice; the first touch allocates then.
	if err := unix.Madvise(b, unix.MADV_POPULATE_WRITE); err != nil && err != unix.EINVAL {
		return fmt.Errorf("grow tables to %d bytes: %w", to, err)
	}
	m.n.Store(to)
	return nil
}

// Close gives everything back. Nothing may look at the bytes any more.
func (m *memory) Close() error {
	b := m.reserved
	m.reserved = nil
	m.n.Store(0)
	if b == nil {
		return nil
	}
	return unix.Munmap(b)
}

// roundUp is n or the next multiple of unit, a power of two.
func roundUp(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }
