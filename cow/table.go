// The table of a layer or overlay: chunk -> word.
//
// A table is a radix tree in memory that never moves, with offsets instead of
// pointers, so that it is the same bytes wherever it is mapped. Leaves hold 32
// words (2 MiB of the origin), nodes above them 256 offsets. A device's table
// costs memory for what was preserved, not for what could be: an empty one has a
// root, and a lone chunk somewhere costs a leaf of 256 bytes and its share of
// the nodes above.
//
// Layout, all numbers in the machine's byte order, offsets in units of 64 bytes:
//
//	offset  size  content
//	     0  4096  not the table's (a layer's header)
//	  4096  1024  root: a node, or (devices up to 2 MiB) a leaf
//	  5120     …  nodes and leaves in the order in which they were first needed
//
//	node  256 x 4 bytes: offset of the child, 0 where there is none
//	leaf   32 x 8 bytes: words, with a check of 8 bits in bits 48 to 55
//
// Readers take no lock: a child's offset is stored after the child was zeroed,
// a word after what it points to was written. Nothing is freed before the whole
// table is.

package cow

import (
	"fmt"
	"iter"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"
)

const (
	leafShift = 5
	nodeShift = 8

	leafBytes = 8 << leafShift
	nodeBytes = 4 << nodeShift

	tableUnit = 64
)

const (
	tableHeader = 4096
	tableRoot   = tableHeader / tableUnit // offset of the root in units
	tableNodes  = tableHeader + nodeBytes // offset of the first node that grow makes
)

// maxTable is how many bytes offsets reach: only a device of nearly 2 PiB that is
// overwritten all over needs so many.
const maxTable = tableUnit << 32

// maxGrowth bounds by how much a table grows at a time: a write waits for it.
const maxGrowth = 8 * memoryStep

type table struct {
	path string // of its file, empty where it has none

	register *register // where a layer's is entered, nil where it is not
	entry    int64
	image    *Image // whose layer it is, if it has one that a start can show

	mem    *memory
	levels int // of nodes above the leaves
	end    chunkNo

	// mu serializes growing. Held while memory is allocated.
	mu   sync.Mutex
	used int64 // bytes handed out
}

// newTable makes an empty table for chunks [0, end) in anonymous memory.
func newTable(end chunkNo) (*table, error) { return openTable("", end) }

// openTable opens the table in the file at path, or makes an empty one where it
// does not exist or path is empty.
func openTable(path string, end chunkNo) (*table, error) {
	t := &table{path: path, end: end}
	var size int64
	t.levels, size = tableShape(end)
	var err error
	if t.mem, err = memoryAt(path, min(size, maxTable)); err != nil {
		return nil, err
	}
	// In a table that is opened again nobody knows how much of the last step is
	// used: what is left of it stays unused.
	t.used = t.mem.Len()
	if t.used == 0 {
		if err := t.mem.Grow(memoryStep); err != nil {
			t.mem.Close()
			if path != "" {
				os.Remove(path) // else it looks like one that was emptied
			}
			return nil, err
		}
		t.used = tableNodes
	}
	return t, nil
}

// tableShape is how many levels of nodes a table of chunks [0, end) has above its leaves,
// and how large it is when it has a place for each chunk.
func tableShape(end chunkNo) (levels int, size int64) {
	n := int64(end+1<<leafShift-1) >> leafShift
	size = tableNodes + n*leafBytes
	for ; n > 1; levels++ {
		n = (n + 1<<nodeShift - 1) >> nodeShift
		size += n * nodeBytes
	}
	return levels, size
}

// header is the part of the table's memory that is not the table's.
func (t *table) header() []byte { return t.mem.Bytes()[:tableHeader] }

// load returns the word of c.
func (t *table) load(c chunkNo) word {
	p := t.find(c)
	if p == nil {
		return 0
	}
	return word(atomic.LoadUint64(p)) &^ checkBits
}

// store publishes the word of c, whose place a call of reserve has made. The
// caller holds the chunk's lock, or is the only one who changes this table.
func (t *table) store(c chunkNo, w word) {
	p := t.find(c)
	if p == nil && t.mem.lost.Load() {
		return // what was reserved is gone, with all that was preserved
	}
	atomic.StoreUint64(p, uint64(w.checked(c)))
}

// checkBits are the bits of a stored word that say whether the others are what was
// stored, for this chunk. A slot does not use them.
const checkBits word = 0xff << 48

// checked is w as it is stored. Whatever happens to the bits of one byte shows, and so
// does nearly all else. (Only a start looks: it would cost readers more than it helps.)
func (w word) checked(c chunkNo) word {
	if w == 0 {
		return 0
	}
	x := uint64(w) ^ uint64(c+1)*0x9e3779b97f4a7c15
	x ^= x >> 32
	x ^= x >> 16
	x ^= x >> 8
	return w&^checkBits | word(x&0xff)<<48
}

// sound says whether w is what was stored for c.
func (w word) sound(c chunkNo) bool { return (w &^ checkBits).checked(c) == w }

// reserve makes a place for the words of chunks [c, c+n), or fails with ENOMEM
// or ENOSPC.
func (t *table) reserve(c chunkNo, n int) error { return t.reserveBy(c, n, t.grow) }

// tryReserve is reserve where no memory has to be allocated for that, nor waited for
// while somebody else does; else EAGAIN.
func (t *table) tryReserve(c chunkNo, n int) error { return t.reserveBy(c, n, t.tryGrow) }

func (t *table) reserveBy(c chunkNo, n int, grow func(chunkNo) error) error {
	for last := c + chunkNo(n) - 1; ; c = (c>>leafShift + 1) << leafShift {
		if t.find(c) == nil {
			if err := grow(c); err != nil {
				return err
			}
		}
		if c>>leafShift == last>>leafShift {
			return nil
		}
	}
}

// bytes is how much memory the table takes.
func (t *table) bytes() int64 { return t.mem.Len() }

// forget makes the table's file one that no start takes for a layer's or overlay's.
// It comes before any of its slots is given out again: else a start would find a
// slot in two tables and give it to the wrong one. First it goes from the register: else
// a start would miss it.
func (t *table) forget() error {
	if r := t.register; r != nil {
		t.register = nil // the entry is somebody else's soon, also for who tries again
		r.remove(t.entry)
	}
	wordAt(t.header(), 0).Store(0)
	if t.path == "" {
		return nil
	}
	return os.Remove(t.path)
}

// close leaves the table's file as it is.
func (t *table) close() error { return t.mem.Close() }

// verify says whether everything that the root leads to is inside the table and
// has one place each: what find and from rely on; and whether the words are those that
// were stored.
func (t *table) verify() error {
	seen := make(map[uint32]bool)
	var walk func(at uint32, first chunkNo, level int) error
	walk = func(at uint32, first chunkNo, level int) error {
		n := int64(nodeBytes)
		if level == 0 {
			n = leafBytes
		}
		if off := int64(at) * tableUnit; off < tableHeader || off+n > t.mem.Len() || seen[at] {
			return fmt.Errorf("%w: node at %d", ErrDamaged, off)
		}
		seen[at] = true
		for i := chunkNo(0); level == 0 && i < 1<<leafShift; i++ {
			if w := word(atomic.LoadUint64(t.word(at, i))); !w.sound(first + i) {
				return fmt.Errorf("%w: word of chunk %d", ErrDamaged, first+i)
			}
		}
		for i := chunkNo(0); level > 0 && i < 1<<nodeShift; i++ {
			below := i << (leafShift + (level-1)*nodeShift)
			if next := atomic.LoadUint32(t.child(at, below, level-1)); next != 0 {
				if err := walk(next, first+below, level-1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return walk(tableRoot, 0, t.levels)
}

// find returns the place of c's word, nil if there is none. The layers of a device
// that was resized end in different places.
func (t *table) find(c chunkNo) *uint64 {
	if c >= t.end {
		return nil
	}
	at := uint32(tableRoot)
	for l := t.levels - 1; l >= 0; l-- {
		if at = atomic.LoadUint32(t.child(at, c, l)); at == 0 {
			return nil
		}
	}
	return t.word(at, c)
}

// grow makes the nodes and the leaf on the way to c.
func (t *table) grow(c chunkNo) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.growLocked(c, func() error {
		err := t.mem.Grow(min(max(memoryStep, t.mem.Len()/8), maxGrowth))
		if err != nil {
			// Near the end of the reservation a small step may still fit.
			err = t.mem.Grow(memoryStep)
		}
		return err
	})
}

// tryGrow is grow for tryReserve.
func (t *table) tryGrow(c chunkNo) error {
	if !t.mu.TryLock() {
		return syscall.EAGAIN
	}
	defer t.mu.Unlock()
	return t.growLocked(c, func() error { return syscall.EAGAIN })
}

// growLocked calls more where the memory does not suffice. What it made so far is
// used by whoever comes next.
func (t *table) growLocked(c chunkNo, more func() error) error {
	at := uint32(tableRoot)
	for l := t.levels - 1; l >= 0; l-- {
		p := t.child(at, c, l)
		next := atomic.LoadUint32(p)
		if next == 0 {
			n := int64(nodeBytes)
			if l == 0 {
				n = leafBytes
			}
			if t.used+n > t.mem.Len() {
				if err := more(); err != nil {
					return err
				}
			}
			next = uint32(t.used / tableUnit)
			t.used += n
			atomic.StoreUint32(p, next)
		}
		at = next
	}
	return nil
}

// child is the place of the offset of c's child in the node at, which is l
// levels above the lowest nodes.
func (t *table) child(at uint32, c chunkNo, l int) *uint32 {
	i := c >> (leafShift + l*nodeShift) & (1<<nodeShift - 1)
	return (*uint32)(unsafe.Pointer(&t.mem.reserved[int64(at)*tableUnit+int64(i)*4]))
}

func (t *table) word(at uint32, c chunkNo) *uint64 {
	i := c & (1<<leafShift - 1)
	return (*uint64)(unsafe.Pointer(&t.mem.reserved[int64(at)*tableUnit+int64(i)*8]))
}

// from yields the chunks from c on that have a word, in ascending order.
func (t *table) from(c chunkNo) iter.Seq2[chunkNo, word] {
	return func(yield func(chunkNo, word) bool) {
		for c < t.end {
			p, skip := t.probe(c)
			if p == nil {
				c = (c>>skip + 1) << skip
				continue
			}
			if w := word(atomic.LoadUint64(p)) &^ checkBits; w != 0 && !yield(c, w) {
				return
			}
			c++
		}
	}
}

// probe is find, and where there is no place for c's word it says how large the
// gap is: the chunks that agree with c above bit skip have none.
func (t *table) probe(c chunkNo) (p *uint64, skip int) {
	at := uint32(tableRoot)
	for l := t.levels - 1; l >= 0; l-- {
		if at = atomic.LoadUint32(t.child(at, c, l)); at == 0 {
			return nil, leafShift + l*nodeShift
		}
	}
	return t.word(at, c), 0
}
