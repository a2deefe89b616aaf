// A tree: what the live map, a frozen map and a view have in common, and how
// marks get into one.

package cbt

import "sync/atomic"

// tree is a root and what is said about it.
type tree struct {
	// These do not change once others know the tree.
	*nodes
	history
	shift  int    // tracking block size in bytes as a power of two
	size   int64  // of the device, in bytes
	epoch  uint64 // nodes of this epoch are this tree's alone
	record int64  // offset of its record
	era    uint64 // of nodes, when its generation began
	live   bool   // it is or was the live map's, and is not a frozen map's

	// root is what the record's root is, for those who find the tree here. It
	// changes under nodes.mu.
	root atomic.Uint64

	// lost is set before a mark that could not be set returns.
	lost atomic.Bool

	// The fields below are protected by nodes.mu.

	// over is set once nothing may be marked here any more: the live map goes
	// on in another tree, or the frozen map was released.
	over bool

	// users are the map or the frozen map that this is, and views. The tree has
	// a count of its root while there are any.
	users int
}

// isLost says that a mark is missing.
func (t *tree) isLost() bool { return t.lost.Load() || t.gone() }

// gone says that the memory was lost that the tree was in.
func (t *tree) gone() bool { return t.era != t.nodes.era.Load() }

// blocks is how many tracking blocks the device has.
func (t *tree) blocks() int64 { return blocksOf(t.size, t.shift) }

func blocksOf(size int64, shift int) int64 {
	if size == 0 {
		return 0
	}
	return (size-1)>>shift + 1
}

// span returns the tracking blocks [from, to) that [off, off+n) touches, cut
// to the device. It is empty if n is 0 or less.
func (t *tree) span(off, n int64) (from, to int64) {
	if off < 0 && n > 0 {
		n, off = n+off, 0
	}
	if n <= 0 || off >= t.size {
		return 0, 0
	}
	return off >> t.shift, blocksOf(off+min(n, t.size-off), t.shift)
}

// leaf returns the leaf that holds block, 0 if there is none.
func (t *tree) leaf(block int64) link {
	l, b := link(t.root.Load()), uint64(block)
	shift := uint(spanBits(l.level())) % 64
	if b>>shift != 0 {
		return 0
	}
	for l != 0 && shift > leafBits {
		shift = (shift - indexBits) % 64
		l = t.link(l.data() + int64(b>>shift%(1<<indexBits)*8))
	}
	return l
}

// seen says that [off, off+n) is inside one tracking block that is marked
// already. It is the short way for most writes.
func (t *tree) seen(off, n int64) bool {
	shift := uint(t.shift) % 64
	b := uint64(off) >> shift
	if n <= 0 || uint64(off+n-1)>>shift != b {
		return false
	}
	l := t.leaf(int64(b))
	if l.epoch() != t.epoch {
		return false
	}
	w := t.load(l.data() + int64(b%(1<<leafBits)&^7))
	return uint64(byte(w>>(b%8*8))) == t.number-t.base
}

// mark raises the bytes of the blocks [from, to) to at least number, as far as
// number lies between the tree's base and number. It stops early when the tree
// is over, and when it gets lost.
func (t *tree) mark(from, to int64, number uint64) {
	if number <= t.base {
		return
	}
	v := byte(min(number, t.number) - t.base)
	for b := from; b < to; {
		end := min(to, b|(1<<leafBits-1)+1)
		l := t.leaf(b)
		if l.epoch() != t.epoch {
			if t.marked(l, b, end, number) {
				b = end
				continue
			}
			if l = t.own(b); l == 0 {
				return
			}
		}
		t.lift(l, b, end, v)
		b = end
	}
}

// lift raises the bytes of the blocks [from, to) in the leaf l to at least v.
func (t *tree) lift(l link, from, to int64, v byte) {
	for b := from; b < to; {
		end := min(to, b|7+1)
		w := t.word(l.data() + b&(1<<leafBits-1)&^7)
		mask := bytesMask(b&7, end-b&^7)
		for {
			was := w.Load()
			is := raise(was, mask, v)
			if is == was {
				break
			}
			if w.CompareAndSwap(was, is) {
				if t.stepped != nil {
					t.stepped()
				}
				break
			}
		}
		b = end
	}
}

// marked says whether the bytes of the blocks [from, to) in the leaf l, which
// others use too, stand for number or a higher one already.
func (t *tree) marked(l link, from, to int64, number uint64) bool {
	if l == 0 || t.nodeNumber(l) < number {
		return false
	}
	base := t.nodeBase(l)
	if number <= base {
		return false
	}
	less := byte(number - base - 1)
	for b := from; b < to; {
		end := min(to, b|7+1)
		mask := bytesMask(b&7, end-b&^7)
		if fill(above(t.load(l.data()+b&(1<<leafBits-1)&^7), less))&mask != mask {
			return false
		}
		b = end
	}
	return true
}

// own returns the leaf that holds block once it is the tree's own, copying
// what is not on the way to it. It returns 0 if the tree is over or lost.
func (t *tree) own(block int64) link {
	for {
		l, ok := t.tryOwn(block)
		if ok {
			return l
		}
		// What was copied so far stays, so one node is enough to go on.
		if err := t.fill(1); err != nil {
			t.lose()
		}
	}
}

// tryOwn is own for as long as there are nodes. It returns false where there
// are none.
func (t *tree) tryOwn(block int64) (link, bool) {
	t.mu.Lock()
	defer t.mu.Unlock() // also where memory faults and the caller recovers
	if t.over || t.lost.Load() {
		return 0, true
	}
	l, ok := t.ownLocked(block)
	t.fillSoonLocked()
	return l, ok
}

// ownLocked returns the leaf as own does, or false where a node is missing.
func (t *tree) ownLocked(block int64) (link, bool) {
	if !t.raiseRootLocked(block) {
		return 0, false
	}
	slot := t.record + recordRoot
	l := link(t.root.Load())
	for level := l.level(); ; level-- {
		if l == 0 || l.epoch() != t.epoch {
			c, ok := t.makeLocked(t.info(level, block), l)
			if !ok {
				return 0, false
			}
			t.publishLocked(slot, c)
			t.replaceLocked(l)
			l = c
		}
		if level == 0 {
			return l, true
		}
		slot = l.slot(block)
		l = t.link(slot)
	}
}

// raiseRootLocked puts indexes above the root until it covers block.
func (t *tree) raiseRootLocked(block int64) bool {
	for {
		root := link(t.root.Load())
		level := root.level() + 1
		switch {
		case root == 0:
			level = levelFor(block)
		case block>>spanBits(root.level()) == 0:
			return true
		}
		up, ok := t.makeLocked(t.info(level, 0), 0)
		if !ok {
			return false
		}
		if root != 0 {
			// The root's count is the new link's from now on.
			t.word(up.data()).Store(uint64(root))
		}
		t.publishLocked(t.record+recordRoot, up)
	}
}

// info is the header of a node that the tree makes now, of the level, and on
// the path to block.
func (t *tree) info(level int, block int64) nodeInfo {
	return nodeInfo{
		level:  level,
		epoch:  t.epoch,
		base:   t.base,
		number: t.number,
		first:  block &^ (1<<spanBits(level) - 1),
	}
}

// publishLocked stores a link to a finished node. In memory it comes first:
// whoever finds the root in t may mark below it, and a process that is killed
// then must have left the mark where Open finds it.
func (t *tree) publishLocked(slot int64, l link) {
	t.store(slot, uint64(l))
	if slot == t.record+recordRoot {
		t.root.Store(uint64(l))
	}
}

// replaceLocked gives up the count of a node that a copy took the place of.
func (t *tree) replaceLocked(old link) {
	switch {
	case old == 0:
	case t.live:
		t.replaced = append(t.replaced, old.node())
	default:
		t.dropLocked([]node{old.node()})
	}
}

// lose notes that a mark is missing.
func (t *tree) lose() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.over {
		t.store(t.record+recordState, stateLost)
		t.lost.Store(true)
	}
}
