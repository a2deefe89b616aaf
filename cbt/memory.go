// Where a map lives.

package cbt

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
