// The live map.

package cbt

import (
	"fmt"
	"math"
	"sync"
	"sync/atomic"

	"github.com/google/uuid"
)

// DefaultBlock is the size of a tracking block in bytes where nobody asks for
// another.
const DefaultBlock = 64 << 10

// Map is the live map of a device. Its methods may be called from many
// goroutines at once, with one restriction: no Mark may run during Freeze or
// Reset. A write marks before it changes the device, and keeps Freeze and
// Reset out until it has: otherwise its mark would be in the frozen map of a
// snapshot that does not hold its change, or missing from a new generation.
type Map struct {
	live  atomic.Pointer[tree]
	shift int
	*nodes

	// turning is held by Freeze, Reset and Resize, which would undo one
	// another. It is taken before all other locks.
	turning sync.Mutex

	// limit is the highest value of a map byte: 255 but in tests.
	limit uint64

	// These are protected by nodes.mu.
	epoch   uint64  // the last epoch that was given to a tree
	records []int64 // offsets of free records
	tables  link    // the newest table
}

// New makes an empty map in mem, which is empty or all zeroes. size is that of
// the device, a multiple of 512; blockSize that of a tracking block, a power
// of two from 4 KiB to 16 MiB, both in bytes. number is the base of the new
// generation; the first snapshot's frozen map gets number+1. It is 0 or, for a
// device that had snapshots, above the last one's: changes since that one are
// not known.
//
// The map uses mem until it is closed, and does not close it.
func New(mem Memory, size, blockSize int64, generation uuid.UUID, number uint64) (*Map, error) {
	return newEmpty(mem, size, blockSize, history{number: number + 1, base: number, generation: generation})
}

// newEmpty makes an empty map with a history.
func newEmpty(mem Memory, size, blockSize int64, h history) (*Map, error) {
	shift, err := blockShift(blockSize)
	if err != nil {
		return nil, err
	}
	if err := checkSize(size); err != nil {
		return nil, err
	}
	if h.number-1 >= math.MaxInt64 {
		return nil, fmt.Errorf("begin a changed-block map at number %d: too high", h.number-1)
	}
	m := newMap(mem, shift)
	if err := m.begin(size, h); err != nil {
		return nil, err
	}
	return m, nil
}

// begin makes the live map.
func (m *Map) begin(size int64, h history) error {
	if err := m.fill(minBatch); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.unused = 1
	m.addTableLocked()
	m.startLocked(size, h)
	// Last, so that a map that is there at all is complete.
	m.store(0, encodeHeader(m.header(0), m.shift))
	return nil
}

// newMap is a map without a tree over mem.
func newMap(mem Memory, shift int) *Map {
	m := &Map{
		shift: shift,
		nodes: &nodes{words: newWords(mem.Bytes()), mem: mem},
		limit: maxByte,
	}
	first := new(grace)
	first.holders.Store(1)
	m.period.Store(first)
	return m
}

func blockShift(blockSize int64) (int, error) {
	for shift := minShift; shift <= maxShift; shift++ {
		if blockSize == 1<<shift {
			return shift, nil
		}
	}
	return 0, fmt.Errorf("tracking block of %d bytes: not a power of two from 4 KiB to 16 MiB", blockSize)
}

func checkSize(size int64) error {
	if size <= 0 || size%512 != 0 {
		return fmt.Errorf("track a device of %d bytes: not a multiple of 512", size)
	}
	return nil
}

// Mark notes that [off, off+n), in bytes, changes after the last snapshot. It
// returns before the caller changes the device. What lies beyond the device is
// ignored, as is n == 0. Where the memory for it cannot be had the map is Lost
// when Mark returns.
func (m *Map) Mark(off, n int64) {
	if t := m.live.Load(); !t.seen(off, n) {
		m.markNow(t, off, n)
	}
}

// markNow is Mark for what the live map's tree t has not seen. It is apart so that
// Mark has nothing to keep for it.
func (m *Map) markNow(t *tree, off, n int64) {
	from, to := t.span(off, n)
	m.mark(from, to, t.number)
}

// MarkAt marks [off, off+n) with at least number, which is at most one more
// than Number; a higher one counts as that. It is for a write to the image of
// an older snapshot, which the next increments must read again. What is at or
// below Base needs no mark: nobody can ask for changes before it. Unlike Mark
// it may run at any time; during a Freeze it marks the new live map, and may
// mark the frozen one.
func (m *Map) MarkAt(off, n int64, number uint64) {
	defer m.leave(m.enter())
	from, to := m.live.Load().span(off, n)
	m.mark(from, to, number)
}

// mark marks the tracking blocks [from, to) with at least number.
func (m *Map) mark(from, to int64, number uint64) {
	for {
		t := m.live.Load()
		t.mark(from, to, number)

		// Where a Freeze came in between, the mark may have gone into a leaf
		// that was copied for the new live map before.
		if m.live.Load() == t {
			return
		}
	}
}

// Lost says that a mark is missing, because there was no memory for it. From
// then on Since of this map, and of what is frozen from it, refuses every
// question. Reset begins a generation that can be trusted.
func (m *Map) Lost() bool { return m.live.Load().isLost() }

// Distrust says that what is in memory is lost: the map, what is frozen from it, and
// views are Lost, and their maps say that everything changed. Like lost marks, that ends
// with Reset. It comes before the memory is zeroed; then all goes on as before.
func (m *Map) Distrust() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.era.Add(1)
}

// Facts are what a map is called and counts at one moment.
type Facts struct {
	Generation uuid.UUID
	Number     uint64 // the last snapshot's
	Base       uint64
	Blocks     int64 // tracking blocks: the length of the map
	BlockSize  int64 // bytes
}

// Facts says where the map stands. It takes no lock and no memory, and unlike View
// costs markers nothing afterwards.
func (m *Map) Facts() Facts {
	t := m.live.Load()
	return Facts{t.generation, t.number - 1, t.base, t.blocks(), 1 << t.shift}
}

// Number is the last snapshot's number, or the one that Reset left out since.
func (m *Map) Number() uint64 { return m.live.Load().number - 1 }

// Base is what map bytes count from.
func (m *Map) Base() uint64 { return m.live.Load().base }

// Generation is the UUID of the current generation.
func (m *Map) Generation() uuid.UUID { return m.live.Load().generation }

// Size is the device's size in bytes.
func (m *Map) Size() int64 { return m.live.Load().size }

// BlockSize is the size of a tracking block in bytes.
func (m *Map) BlockSize() int64 { return 1 << m.shift }

// Close waits for the map's goroutine. Nothing may be marked afterwards; the
// content of the memory stays what it is, for Open.
func (m *Map) Close() {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.fillers.Wait()
}
