// Locks that chunks share.

package cow

import (
	"iter"
	"sync"
)

// stripes is how many locks all chunks share. A power of two, and more than
// anybody takes at once.
const stripes = 256

// chunkLocks are locks for chunks: chunk c has number c % stripes. Several are
// taken in ascending order, so that two who want some of the same do not wait for
// each other for ever. The zero value is ready.
type chunkLocks [stripes]sync.Mutex

// lock takes the locks of chunks first to last, fewer than stripes.
func (k *chunkLocks) lock(first, last chunkNo) {
	for n := range stripesOf(first, last) {
		k[n].Lock()
	}
}

func (k *chunkLocks) unlock(first, last chunkNo) {
	for n := range stripesOf(first, last) {
		k[n].Unlock()
	}
}

// tryLock takes the locks of chunks first to last if nobody has any of them.
func (k *chunkLocks) tryLock(first, last chunkNo) bool {
	for c := first; c <= last; c++ {
		if !k[c%stripes].TryLock() {
			for c > first {
				c--
				k[c%stripes].Unlock()
			}
			return false
		}
	}
	return true
}

// stripesOf yields the numbers of the locks in ascending order.
func stripesOf(first, last chunkNo) iter.Seq[chunkNo] {
	return func(yield func(chunkNo) bool) {
		a, z := first%stripes, last%stripes
		if a > z { // the range wraps around
			for n := range z + 1 {
				if !yield(n) {
					return
				}
			}
			z = stripes - 1
		}
		for n := a; n <= z; n++ {
			if !yield(n) {
				return
			}
		}
	}
}
