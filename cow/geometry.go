// Blocks, chunks, and the arithmetic of ranges.

package cow

import (
	"iter"
	"math/bits"

	"blksnap/store"
)

const (
	blockShift = 12
	chunkShift = 16

	blockSize      = 1 << blockShift
	chunkSize      = 1 << chunkShift
	blocksPerChunk = chunkSize / blockSize

	allBlocks = 1<<blocksPerChunk - 1
)

// A chunk is as long as a slot, and both count in the same blocks.
const _ = uint(chunkSize-store.SlotSize) + uint(store.SlotSize-chunkSize) + uint(blockSize-store.BlockSize)

// chunkNo is the number of a chunk of an origin: its offset / chunkSize.
type chunkNo uint64

// off is where the chunk begins, in bytes.
func (c chunkNo) off() int64 { return int64(c) << chunkShift }

// span is the part of one chunk that a request touches.
type span struct {
	chunk chunkNo
	skip  int64 // bytes from the start of the chunk
	n     int64 // bytes touched, at least 1
}

// mask has a bit for each block of the chunk that the span touches, if only in
// part.
func (s span) mask() uint16 {
	first := s.skip >> blockShift
	last := (s.skip + s.n - 1) >> blockShift
	return blockRange(int(first), int(last-first)+1)
}

// blockRange is the mask of n blocks from block first on.
func blockRange(first, n int) uint16 {
	return uint16((1<<n - 1) << first)
}

// beyond has a bit for each block of the chunk that begins at end or after it.
func (c chunkNo) beyond(end int64) uint16 {
	first := max(0, min(blocksPerChunk, (end-c.off()+blockSize-1)>>blockShift))
	return allBlocks &^ blockRange(0, int(first))
}

// spans yields the part of every chunk that [off, off+n) touches, in ascending
// order; nothing when n is 0. The caller has checked that the range lies within
// the origin.
func spans(off, n int64) iter.Seq[span] {
	return func(yield func(span) bool) {
		for n > 0 {
			skip := off & (chunkSize - 1)
			m := min(n, chunkSize-skip)
			if !yield(span{chunkNo(off >> chunkShift), skip, m}) {
				return
			}
			off, n = off+m, n-m
		}
	}
}

// chunks is how many chunks cover size bytes.
func chunks(size int64) chunkNo {
	c := chunkNo(size >> chunkShift)
	if size&(chunkSize-1) != 0 {
		c++
	}
	return c
}

// runs yields the runs of ones in mask as first block and number of blocks.
func runs(mask uint16) iter.Seq2[int, int] {
	return func(yield func(int, int) bool) {
		for mask != 0 {
			first := bits.TrailingZeros16(mask)
			n := bits.TrailingZeros16(^(mask >> first))
			if !yield(first, n) {
				return
			}
			mask &^= blockRange(first, n)
		}
	}
}

// word says where the preserved blocks of a chunk are: a slot of the snapstore
// (upper 48 bits) and a bit for each block that is in it (lower 16). The zero
// word says that nothing is preserved.
type word uint64

// zeroWord says that the whole chunk was a hole: it reads as zeroes and has no
// slot.
const zeroWord word = allBlocks

func makeWord(s store.Slot, mask uint16) word { return word(s)<<blocksPerChunk | word(mask) }

func (w word) slot() store.Slot { return store.Slot(w >> blocksPerChunk) }
func (w word) mask() uint16     { return uint16(w) }

// hasSlot is false for the zero word and for zeroWord.
func (w word) hasSlot() bool { return w.slot() != 0 }

// blocks is how many blocks of a slot the word names.
func (w word) blocks() int64 {
	if !w.hasSlot() {
		return 0
	}
	return int64(bits.OnesCount16(w.mask()))
}

// with adds blocks to the word.
func (w word) with(mask uint16) word { return w | word(mask) }
