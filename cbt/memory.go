// Where a map lives.

package cbt

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Memory is where a map lives: one run of bytes that only grows and never
// moves, and reads as zeroes when new. A Map calls Grow from one goroutine at
// a time.
type Memory interface {
	// Bytes is all that was reserved. Only the first Len bytes may be
	// touched. The slice is aligned to 8 bytes and is always the same one.
	Bytes() []byte

	// Len is how many bytes may be touched.
	Len() int64

	// Grow adds at least n bytes to Len, allocated and populated, so that
	// touching them cannot fault. On an error (ENOSPC, ENOMEM) nothing was
	// added.
	Grow(n int64) error
}

// Anonymous is a Memory that dies with the process.
type Anonymous struct {
	bytes []byte
	n     int64
}

// reserve is the address space that NewMemory takes. It costs nothing, and is
// 256 times a map in which every 64 KiB of 16 TiB changed.
const reserve = 64 << 30

// NewMemory reserves address space for a map. Close gives it back.
func NewMemory() (*Anonymous, error) { return newAnonymous(reserve) }

func newAnonymous(limit int64) (*Anonymous, error) {
	b, err := unix.Mmap(-1, 0, int(limit), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve %d bytes for a changed-block map: %w", limit, err)
	}
	return &Anonymous{bytes: b}, nil
}

// Bytes implements Memory.
func (a *Anonymous) Bytes() []byte { return a.bytes }

// Len implements Memory.
func (a *Anonymous) Len() int64 { return a.n }

// Grow implements Memory. It rounds n up to whole pages.
func (a *Anonymous) Grow(n int64) error {
	page := int64(unix.Getpagesize())
	n = (n + page - 1) / page * page
	if n > int64(len(a.bytes))-a.n {
		return fmt.Errorf("grow a changed-block map beyond %d bytes: %w", len(a.bytes), unix.ENOMEM)
	}
	add := a.bytes[a.n : a.n+n]
	if err := unix.Mprotect(add, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return fmt.Errorf("grow a changed-block map by %d bytes: %w", n, err)
	}
	// Faults are taken here, in the background, and not by a writer.
	if err := unix.Madvise(add, unix.MADV_POPULATE_WRITE); err != nil && err != unix.EINVAL {
		return fmt.Errorf("populate %d bytes of a changed-block map: %w", n, err)
	}
	a.n += n
	return nil
}

// Close gives the memory back. The map in it must be closed, and none of its
// frozen maps and views may be in use.
func (a *Anonymous) Close() error {
	if err := unix.Munmap(a.bytes); err != nil {
		return fmt.Errorf("unmap a changed-block map: %w", err)
	}
	return nil
}
