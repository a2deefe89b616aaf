package cbt

import (
	"fmt"
	"testing"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// heap is a Memory in Go's heap, where the race detector sees what happens in
// it.
type heap struct {
	bytes []byte
	n     int64
	// fail, where it is set, is asked before memory grows.
	fail func() error
}

func newHeap(limit int64) *heap {
	words := make([]uint64, limit/8)
	return &heap{bytes: unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), len(words)*8)}
}

func (h *heap) Bytes() []byte { return h.bytes }
func (h *heap) Len() int64    { return h.n }

func (h *heap) Grow(n int64) error {
	if h.fail != nil {
		if err := h.fail(); err != nil {
			return err
		}
	}
	if n > int64(len(h.bytes))-h.n {
		return fmt.Errorf("grow by %d: %w", n, unix.ENOSPC)
	}
	h.n += n
	return nil
}

// newTestMap returns a map in mem that is checked and closed when the test
// ends.
func newTestMap(t *testing.T, mem Memory, size, block int64, generation uuid.UUID, number uint64) *Map {
	t.Helper()
	m, err := New(mem, size, block, generation, number)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.Close()
	})
	return m
}
