// Which runs of bytes changed.

package cbt

import "iter"

// Since yields the runs [off, off+n) of bytes that changed after snapshot num:
// ascending, disjoint, never touching, and cut to the device. It returns false
// if num is below Base or above Number, and of a lost map: a full read is due.
// The runs may be asked for several times; a frozen map that was marked
// meanwhile has more.
func (v *View) Since(num uint64) (iter.Seq2[int64, int64], bool) {
	return v.ChangedSince(0, v.Size(), num)
}

// ChangedSince is Since for [off, off+n) alone: what it yields is cut to that
// range, which is cut to the device.
func (v *View) ChangedSince(off, n int64, num uint64) (iter.Seq2[int64, int64], bool) {
	if num < v.Base() || num > v.number || v.Lost() {
		return nil, false
	}
	return func(yield func(off, n int64) bool) {
		t := v.t
		from, to := t.span(off, n)
		if from == to {
			return
		}
		defer t.leave(t.enter())
		c := cut{off: max(off, 0), end: t.size, shift: t.shift, yield: yield}
		if n < c.end-off {
			c.end = off + n
		}
		if v.released.Load() || v.Lost() {
			// What is gone by now cannot say what did not change.
			c.emit(from, to)
			return
		}
		s := scan{nodes: t.nodes, num: num, from: from, to: to, emit: c.emit}
		root := link(t.root.Load())
		_ = s.node(root, root.level(), 0) && s.clean(min(to, 1<<spanBits(root.level())))
	}, true
}

// cut turns runs of tracking blocks into runs of bytes inside [off, end).
type cut struct {
	off, end int64
	shift    int
	yield    func(off, n int64) bool
}

// emit yields the tracking blocks [from, to). Where the last one reaches end it
// is not shifted: on a device of almost 2^63 bytes that would overflow.
func (c cut) emit(from, to int64) bool {
	off, end := max(from<<c.shift, c.off), c.end
	if to <= (c.end-1)>>c.shift {
		end = to << c.shift
	}
	return c.yield(off, end-off)
}

// scan walks a tree in search of blocks that changed after num. Its methods
// return false when the consumer has enough.
type scan struct {
	*nodes
	num      uint64
	from, to int64 // blocks that are asked for

	// run is where the current run of changed blocks begins, if there is one.
	run   int64
	inRun bool
	emit  func(from, to int64) bool
}

// clean notes that block did not change.
func (s *scan) clean(block int64) bool {
	if !s.inRun {
		return true
	}
	s.inRun = false
	return s.emit(s.run, block)
}

// dirty notes that block changed.
func (s *scan) dirty(block int64) {
	if !s.inRun {
		s.run, s.inRun = block, true
	}
}

// node scans the node l of the level, the first block of which is first.
func (s *scan) node(l link, level int, first int64) bool {
	// A node without a higher number is passed over with all below it.
	if l == 0 || s.nodeNumber(l) <= s.num {
		return s.clean(max(first, s.from))
	}
	if level == 0 {
		return s.leaf(l, first)
	}
	span := int64(1) << spanBits(level-1)
	i := max(0, s.from-first) / span
	for b := first + i*span; i < 1<<indexBits && b < s.to; i, b = i+1, b+span {
		if !s.node(s.link(l.data()+i*8), level-1, b) {
			return false
		}
	}
	return true
}

// leaf scans the leaf l, the first block of which is first.
func (s *scan) leaf(l link, first int64) bool {
	less := s.num - s.nodeBase(l)
	if less >= maxByte {
		return s.clean(max(first, s.from))
	}
	from, to := max(first, s.from), min(first+1<<leafBits, s.to)
	at := l.data() - first
	for b := from &^ 7; b < to; b += 8 {
		b = s.skip(at, b, to, byte(less))
		if b >= to {
			break
		}
		m := above(s.load(at+b), byte(less)) & bytesMask(max(from-b, 0), min(to-b, 8))
		if !s.word(m, b, min(to-b, 8)) {
			return false
		}
	}
	return true
}

// skip passes over the whole words from block b on that change nothing in
// what is being collected: all changed in a run, none outside.
func (s *scan) skip(at, b, to int64, less byte) int64 {
	same := uint64(0)
	if s.inRun {
		same = tops
	}
	for b+8 <= to && above(s.load(at+b), less) == same {
		b += 8
	}
	return b
}

// word scans the first n blocks from b on, those changed having their byte's
// top bit set in m.
func (s *scan) word(m uint64, b, n int64) bool {
	for i := range n {
		if m>>(8*i)&0x80 != 0 {
			s.dirty(b + i)
		} else if !s.clean(b + i) {
			return false
		}
	}
	return true
}
