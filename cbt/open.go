// Finding a map again in the memory of a process that is no more.

package cbt

import (
	"cmp"
	"fmt"
	"slices"
)

// Open returns the map that is in mem, left behind by a process that was
// killed at any instant or ended, and its frozen maps by ascending number.
// The caller releases those that it has no snapshot for.
//
// Everything that a root leads to is verified but for the map bytes, of which
// each value is a valid one. Errors are ErrNoMap, ErrVersion and ErrDamaged;
// then nothing in mem was changed.
func Open(mem Memory) (*Map, []*Frozen, error) {
	if mem.Len() < 2*nodeSize {
		return nil, nil, ErrNoMap
	}
	shift, err := decodeHeader(mem.Bytes()[:nodeHeader])
	if err != nil {
		return nil, nil, err
	}
	m := newMap(mem, shift)
	m.counts = make([]uint32, min(mem.Len()/nodeSize, maxNodes))
	w := walk{Map: m, live: commitOffset(m.load(headerLive))}
	if err := w.allTables(); err != nil {
		return nil, nil, err
	}
	frozen, err := w.roots()
	if err != nil {
		return nil, nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for no := len(m.counts) - 1; no > 0; no-- {
		if m.counts[no] == 0 {
			m.free = append(m.free, node(no))
		}
	}
	m.unused = node(len(m.counts))
	for _, r := range w.stale {
		m.store(r+recordState, stateFree)
		m.records = append(m.records, r)
	}
	return m, frozen, nil
}

// walk finds and counts what the roots lead to.
type walk struct {
	*Map
	live  int64   // offset of the live map's record
	used  []int64 // offsets of the records in use
	stale []int64 // offsets of those that a killed Freeze or Reset left
}

// allTables collects the records.
func (w *walk) allTables() error {
	w.tables = link(w.load(headerTable))
	for l := w.tables; l != 0; l = w.link(l.node().offset() + nodeNext) {
		if l.level() != tableLevel {
			return fmt.Errorf("%w: table %d has level %d", ErrDamaged, l.node(), l.level())
		}
		if _, err := w.info(l); err != nil {
			return err
		}
		if w.counts[l.node()]++; w.counts[l.node()] > 1 {
			return fmt.Errorf("%w: table %d is linked twice", ErrDamaged, l.node())
		}
		for r := l.data(); r < l.data()+nodeData; r += recordSize {
			if w.load(r+recordState) == stateFree {
				w.records = append(w.records, r)
			} else {
				w.used = append(w.used, r)
			}
		}
	}
	return nil
}

// roots makes the trees of the records in use.
func (w *walk) roots() ([]*Frozen, error) {
	trees := make(map[int64]*tree)
	for _, r := range w.used {
		t, err := w.tree(r)
		if err != nil {
			return nil, err
		}
		trees[r] = t
	}
	now := trees[w.live]
	if now == nil || w.load(headerLive) != commitWord(w.live, w.bytes[w.live:]) {
		return nil, fmt.Errorf("%w: no live map", ErrDamaged)
	}
	var frozen []*Frozen
	for r, t := range trees {
		if t.number < now.number && !endedBy(t, now) {
			frozen = append(frozen, &Frozen{View{m: w.Map, t: t, number: t.number}})
		} else if t != now {
			delete(trees, r)
			w.stale = append(w.stale, r)
		}
	}
	for _, t := range trees {
		if err := w.node(link(t.root.Load()), nodeInfo{number: t.number, base: t.base}); err != nil {
			return nil, err
		}
	}
	// New epochs for all: what was a tree's own is copied once more, which is
	// simpler than to find out whose it was.
	for _, t := range trees {
		w.epoch++
		t.epoch = w.epoch
	}
	now.live = true
	w.Map.live.Store(now)
	slices.SortFunc(frozen, func(a, b *Frozen) int { return cmp.Compare(a.number, b.number) })
	return frozen, nil
}

// endedBy says that t was the live map until Reset began the generation of now,
// and was killed before it gave up t's record. No frozen map has that number.
func endedBy(t, now *tree) bool {
	return t.number == now.base && t.generation != now.generation
}

// tree makes the tree of the record r.
func (w *walk) tree(r int64) (*tree, error) {
	h, ok := decodeHistory(w.bytes[r:][:recordSize])
	if !ok {
		return nil, fmt.Errorf("%w: checksum of the record at %d", ErrDamaged, r)
	}
	t := &tree{nodes: w.nodes, history: h, shift: w.shift, size: int64(w.load(r + recordBytes)), record: r, users: 1}
	if err := checkSize(t.size); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	switch state := w.load(r + recordState); state {
	case stateUsed:
	case stateLost:
		t.lost.Store(true)
	default:
		return nil, fmt.Errorf("%w: state %d of the record at %d", ErrDamaged, state, r)
	}
	t.root.Store(w.load(r + recordRoot))
	return t, nil
}

// node counts the node that l leads to, and at first sight what is below it.
// limit has the first tracking block that it must cover, and the highest
// number and base that it can have.
func (w *walk) node(l link, limit nodeInfo) error {
	if l == 0 {
		return nil
	}
	i, err := w.info(l)
	if err != nil {
		return err
	}
	if !i.fits(limit) {
		return fmt.Errorf("%w: node %d is not where it belongs", ErrDamaged, l.node())
	}
	w.epoch = max(w.epoch, i.epoch)
	if w.counts[l.node()]++; w.counts[l.node()] > 1 || i.level == 0 {
		return nil
	}
	for b := int64(0); b < 1<<indexBits; b++ {
		c := w.link(l.data() + b*8)
		if c != 0 && c.level() != i.level-1 {
			return fmt.Errorf("%w: node %d links to level %d", ErrDamaged, l.node(), c.level())
		}
		i.first = limit.first + b<<spanBits(i.level-1)
		if err := w.node(c, i); err != nil {
			return err
		}
	}
	return nil
}

// fits says whether a node may be where the first tracking block, the highest number
// and the highest base are those of limit.
func (i nodeInfo) fits(limit nodeInfo) bool {
	return i.level <= maxLevel && i.first == limit.first && i.number <= limit.number && i.base <= limit.base &&
		i.number > i.base && i.number-i.base <= maxByte
}

// info returns the header of the node that l leads to, if it exists and is
// what l says.
func (w *walk) info(l link) (nodeInfo, error) {
	if l.node() == 0 || int64(l.node()) >= int64(len(w.counts)) {
		return nodeInfo{}, fmt.Errorf("%w: no node %d", ErrDamaged, l.node())
	}
	i, ok := decodeNode(w.header(l.node()))
	if !ok {
		return nodeInfo{}, fmt.Errorf("%w: checksum of node %d", ErrDamaged, l.node())
	}
	if i.level != l.level() || i.epoch != l.epoch() {
		return nodeInfo{}, fmt.Errorf("%w: node %d is not the one that was linked", ErrDamaged, l.node())
	}
	return i, nil
}
