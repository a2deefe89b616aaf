// Getting memory before a writer has to wait for it.

package cbt

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// minBatch and maxBatch bound how many nodes memory grows by at once: 65 KiB
// for a small map, 17 MiB for a large one.
const (
	minBatch = 16
	maxBatch = 4096
)

// errClosed says that the map was closed.
var errClosed = errors.New("changed-block map is closed")

// batchLocked is how many nodes memory should grow by: an eighth of what it has.
func (s *nodes) batchLocked() int {
	return min(max(len(s.counts)/8, minBatch), maxBatch)
}

// lately is how many nodes were made since the last Freeze, as far as they can
// be prepared for the next interval.
func (s *nodes) lately() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return min(s.made, maxBatch)
}

// lack is how many nodes are missing until want are available.
func (s *nodes) lack(want int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return want - s.availableLocked()
}

// fill sees to it that at least want nodes are available: those that nobody
// uses any more, or new ones. It returns the error of growing memory if they
// are not.
func (s *nodes) fill(want int) error {
	s.turn()
	for s.lack(want) > 0 && s.reapSome() {
	}
	return s.grow(want)
}

// fillSoonLocked grows memory in the background if less than half a batch is
// available. It does not look into memory: a fault there could be caught by
// nobody.
func (s *nodes) fillSoonLocked() {
	if s.closed || s.availableLocked() >= s.batchLocked()/2 || !s.filling.CompareAndSwap(false, true) {
		return
	}
	want := s.batchLocked()
	s.fillers.Go(func() {
		defer s.filling.Store(false)
		// Who needs the memory asks again, and gets the error.
		_ = s.grow(want)
	})
}

// grow grows memory by a batch if less than want nodes are available, and by
// as few as it takes where there is no room for a batch.
func (s *nodes) grow(want int) error {
	s.growing.Lock()
	defer s.growing.Unlock()
	lack := s.lack(want)
	if lack <= 0 {
		return nil
	}
	s.mu.Lock()
	batch := s.batchLocked()
	s.mu.Unlock()
	if lack < batch && s.growBy(batch) == nil {
		return nil
	}
	return s.growBy(lack)
}

// growBy adds at least n nodes. The caller holds growing.
func (s *nodes) growBy(n int) error {
	s.mu.Lock()
	have, closed := len(s.counts), s.closed
	s.mu.Unlock()
	if closed {
		return errClosed
	}
	if have+n > maxNodes {
		return fmt.Errorf("grow a changed-block map beyond %d nodes: %w", maxNodes, unix.ENOSPC)
	}
	if need := node(have+n).offset() - s.mem.Len(); need > 0 {
		if err := s.mem.Grow(need); err != nil {
			return err
		}
	}
	total := min(s.mem.Len()/nodeSize, maxNodes)

	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts = append(s.counts, make([]uint32, int(total)-have)...)
	return nil
}
