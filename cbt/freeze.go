// Snapshots of the map, new generations, and new sizes: all that replaces the
// live map's tree.

package cbt

import (
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
		return fmt.Errorf("prepare to freeze a changed-block map: %w", errors.Join(errUnprepared, err))
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
	root := link(was.root.Load())
	if root != 0 {
		m.counts[root.node()]++
	}
	now := history{number: was.number + 1, base: m.nextBase(was.history), generation: was.generation}
	m.startLocked(was.size, now, root, was.lost.Load())
	return m.frozenLocked(was.size, was.history, was.record, root, was.lost.Load()), nil
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
	m.startLocked(was.size, history{number: was.number + 1, base: was.number, generation: generation}, 0, false)
	m.retireLocked(was)
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
	t := m.live.Load()
	m.store(t.record+recordBytes, uint64(size))
	m.goOnLocked(t, size, t.epoch)
	return nil
}

// startLocked makes a record of a new live tree and commits it.
func (m *Map) startLocked(size int64, h history, root link, lost bool) {
	record := m.records[len(m.records)-1]
	m.records = m.records[:len(m.records)-1]
	h.encode(m.bytes[record:][:recordSize])
	m.store(record+recordRoot, uint64(root))
	m.store(record+recordBytes, uint64(size))
	m.store(record+recordState, stateOf(lost))
	m.store(headerLive, commitWord(record, m.bytes[record:]))

	m.epoch++
	t := &tree{nodes: m.nodes, history: h, shift: m.shift, size: size, epoch: m.epoch, record: record, live: true}
	t.root.Store(uint64(root))
	t.lost.Store(lost)
	if was := m.live.Swap(t); was != nil {
		was.over = true
	}
	// No marker runs, so none holds a link to what was replaced; readers may.
	m.dropLocked(m.replaced)
	m.replaced, m.made = nil, 0
}

// goOnLocked replaces the live tree t by one of another size or epoch. Markers
// that are under way in t notice, and mark again in the new one.
func (m *Map) goOnLocked(t *tree, size int64, epoch uint64) {
	next := &tree{nodes: t.nodes, history: t.history, shift: t.shift, size: size, epoch: epoch, record: t.record, live: true}
	next.root.Store(t.root.Load())
	next.lost.Store(t.lost.Load())
	m.live.Store(next)
	t.over = true
}

// frozenLocked is the frozen map of a record that is not, or no longer, the
// live map's.
func (m *Map) frozenLocked(size int64, h history, record int64, root link, lost bool) *Frozen {
	m.epoch++
	t := &tree{nodes: m.nodes, history: h, shift: m.shift, size: size, epoch: m.epoch, record: record}
	t.root.Store(uint64(root))
	t.lost.Store(lost)
	return &Frozen{View{m: m, t: t, number: h.number}}
}

// retireLocked ends the use of the tree t. Its record is free at once; its
// nodes are when no reader can be among them any more.
func (m *Map) retireLocked(t *tree) {
	t.over = true
	if t.record != 0 {
		m.store(t.record+recordState, stateFree)
		m.records = append(m.records, t.record)
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
