// Snapshots of the map, new generations, and new sizes: all that replaces the
// live map's tree.

package cbt

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/google/uuid"
)

// errUnprepared is what Freeze says when Prepare was not called or failed.
var errUnprepared = errors.New("no memory was prepared for a frozen map")

// Prepare gets what a Freeze needs, so that it takes no time and cannot fail,
// and some memory for the copies that the first marks after it make. It is
// called before writes are held up.
func (m *Map) Prepare() error {
	m.reap()
	// What was marked since the last snapshot is likely to be marked again.
	err := m.fill(m.lately() + minBatch)

	m.mu.Lock()
	defer m.mu.Unlock()
	if m.epoch >= maxEpoch {
		return fmt.Errorf("prepare to freeze a changed-block map: %d epochs are used up", m.epoch)
	}
	// Reset needs a record when there is no memory at all, so one stays.
	if len(m.records) < 2 && !m.addTableLocked() {
		return fmt.Errorf("prepare to freeze a changed-block map: %w", cmp.Or(err, errUnprepared))
	}
	return nil
}

// Freeze gives the map as it is now to a snapshot and moves the number on. It
// takes the same short time whatever the size of the device. No Mark may run
// meanwhile. It fails only where Prepare was not called since the last Freeze,
// and then changes nothing.
//
// When the process is killed during Freeze, Open finds it done or not begun. A
// snapshot that did not come about releases the frozen map; its number is not
// used again.
func (m *Map) Freeze() (*Frozen, error) {
	m.turning.Lock()
	defer m.turning.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.records) < 2 {
		return nil, errUnprepared
	}
	was := m.live.Load()
	next, frozen := m.copyLocked(was), m.copyLocked(was)
	next.number, next.base = was.number+1, m.nextBase(was.history)
	next.epoch, frozen.epoch = m.epoch+1, m.epoch+2
	m.epoch += 2
	m.recordLocked(next)
	m.switchLocked(next)
	return &Frozen{View{m: m, t: frozen, number: frozen.number}}, nil
}

// nextBase is the base of the interval after h. It moves only as far as it
// must. Moving costs nothing: a leaf is copied in every interval before its
// first mark, and only the copy counts from the new base. So the history that
// can be asked for is as long as it can be, always the last 254 snapshots and
// not something between 127 and 254.
func (m *Map) nextBase(h history) uint64 {
	if h.number+1-h.base > m.limit {
		return h.number + 1 - m.limit
	}
	return h.base
}

// Reset begins a new generation, in which nothing was marked yet. No Mark may
// run meanwhile. Frozen maps keep their generation. It needs no memory, and so
// cannot fail.
//
// Its base is a number that no snapshot had: what changed between the last
// snapshot and now is in no map any more, so whoever asks for the changes since
// that snapshot must be told that they are not known.
func (m *Map) Reset(generation uuid.UUID) {
	m.turning.Lock()
	defer m.turning.Unlock()
	m.restart(generation)
	m.reap()
}

// restart is the short part of Reset.
func (m *Map) restart(generation uuid.UUID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	was := m.live.Load()
	h := history{number: was.number + 1, base: was.number, generation: generation}
	m.startLocked(was.size, h)
	m.forgetLocked(was)
}

// Resize sets the device's size in bytes, a multiple of 512. What a growing
// device gains is marked, from the tracking block on in which it ended. Frozen
// maps keep their size. When there is no memory for the marks the map is Lost.
// Freeze and Reset wait for it.
func (m *Map) Resize(size int64) error {
	if err := checkSize(size); err != nil {
		return err
	}
	m.turning.Lock()
	defer m.turning.Unlock()
	// First: a process that is killed in between leaves a map of the old size,
	// and the caller's next start resizes it again.
	if t := m.live.Load(); size > t.size {
		m.mark(t.size>>m.shift, blocksOf(size, m.shift), t.number)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	was := m.live.Load()
	m.store(was.record+recordBytes, uint64(size))
	next := m.copyLocked(was)
	next.size = size
	m.switchLocked(next)
	return nil
}

// startLocked begins the first interval of a generation.
func (m *Map) startLocked(size int64, h history) {
	m.epoch++
	t := &tree{nodes: m.nodes, history: h, shift: m.shift, size: size, epoch: m.epoch, era: m.era.Load(), users: 1}
	m.recordLocked(t)
	m.switchLocked(t)
}

// copyLocked returns a tree like t, with a use and a count of the root of its
// own.
func (m *Map) copyLocked(t *tree) *tree {
	c := &tree{nodes: t.nodes, history: t.history, shift: t.shift, size: t.size, epoch: t.epoch, era: t.era, record: t.record, users: 1}
	c.lost.Store(t.lost.Load())
	if root := link(t.root.Load()); root != 0 {
		m.counts[root.node()]++
		c.root.Store(uint64(root))
	}
	return c
}

// recordLocked gives t a record of its own, and commits it as the live map's.
func (m *Map) recordLocked(t *tree) {
	last := len(m.records) - 1
	t.record = m.records[last]
	p := m.bytes[t.record:][:recordSize]
	t.history.encode(p)
	m.store(t.record+recordRoot, t.root.Load())
	m.store(t.record+recordBytes, uint64(t.size))
	m.store(t.record+recordState, stateOf(t.lost.Load()))
	m.store(headerLive, commitWord(t.record, p))
	m.records = m.records[:last] // now, because who faulted above begins again

	// No Mark runs, so none holds a link to what was replaced; readers may.
	m.dropLocked(m.replaced)
	m.replaced, m.made = nil, 0
}

// switchLocked makes t the live map's tree.
func (m *Map) switchLocked(t *tree) {
	t.live = true
	if was := m.live.Swap(t); was != nil {
		was.over = true
		m.unuseLocked(was)
	}
}

// forgetLocked frees the record of t: Open does not find it any more.
func (m *Map) forgetLocked(t *tree) {
	t.over = true
	m.store(t.record+recordState, stateFree)
	m.records = append(m.records, t.record)
}

// unuseLocked ends a use of t. After the last its nodes are free, but for those
// that others use, too, when no reader can be among them any more.
func (m *Map) unuseLocked(t *tree) {
	if t.users--; t.users > 0 {
		return
	}
	if root := link(t.root.Load()); root != 0 {
		m.dropLocked([]node{root.node()})
	}
}

// addTableLocked makes a table of free records, and returns false if there is
// no memory.
func (m *Map) addTableLocked() bool {
	no, ok := m.allocLocked()
	if !ok {
		return false
	}
	clear(m.data(no))
	nodeInfo{level: tableLevel}.encode(m.header(no))
	m.store(no.offset()+nodeNext, uint64(m.tables))
	m.tables = newLink(no, tableLevel, 0)
	m.store(headerTable, uint64(m.tables))
	for i := int64(0); i < nodeData; i += recordSize {
		m.records = append(m.records, m.tables.data()+i)
	}
	return true
}

func stateOf(lost bool) uint64 {
	if lost {
		return stateLost
	}
	return stateUsed
}
