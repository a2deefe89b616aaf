// The nodes of a map's memory: handing them out and counting who uses them.

package cbt

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
)

// reapBatch is how many counts are given back under mu before a writer that
// waits for it gets its turn.
const reapBatch = 256

// nodes hands out the nodes of a memory.
type nodes struct {
	words
	mem Memory

	// period is the grace period that readers enter now.
	period atomic.Pointer[grace]

	// era is raised when memory was lost, with all trees of earlier eras.
	era atomic.Uint64

	// filling is set while a goroutine of fillers gets more memory.
	filling atomic.Bool
	fillers sync.WaitGroup

	// growing serializes the growth of memory. It is taken before mu and held
	// while the kernel allocates.
	growing sync.Mutex

	// mu protects the fields below, and every change of a link, of a record
	// and of the live map's tree. Held for microseconds, never across a system
	// call.
	mu     sync.Mutex
	counts []uint32 // of each node, how many links, roots and lists hold it
	free   []node   // nodes that were used before
	unused node     // this node and those after it were never used
	closed bool

	// replaced lists nodes that copies took the place of in the live map since
	// the last Freeze. A marker may still hold a link to them.
	replaced []node

	// made counts the nodes that were made since the last Freeze.
	made int

	// dead lists nodes of which one count each is to be given back.
	dead [][]node
}

// availableLocked is how many nodes can be had without more memory.
func (s *nodes) availableLocked() int {
	return len(s.free) + len(s.counts) - int(s.unused)
}

// allocLocked returns a node that is counted once, and false if there is none.
// Its content is undefined.
func (s *nodes) allocLocked() (node, bool) {
	var no node
	switch {
	case len(s.free) > 0:
		no = s.free[len(s.free)-1]
		s.free = s.free[:len(s.free)-1]
	case int(s.unused) < len(s.counts):
		no = s.unused
		s.unused++
	default:
		return 0, false
	}
	s.counts[no] = 1
	return no, true
}

// makeLocked returns a link to a new node of tree t, filled from the older
// node old of the same place, and false if there is no memory. Whoever stores
// the link stores it after all that is written here.
func (s *nodes) makeLocked(i nodeInfo, old link) (link, bool) {
	no, ok := s.allocLocked()
	if !ok {
		return 0, false
	}
	s.made++
	i.encode(s.header(no))
	l := newLink(no, i.level, i.epoch)
	switch {
	case old == 0:
		clear(s.data(no))
	case i.level == 0:
		s.copyLeaf(l, old)
	default:
		copy(s.data(no), s.data(old.node()))
		s.eachChild(l, func(c node) { s.counts[c]++ })
	}
	return l, true
}

// copyLeaf fills the leaf l, not published yet, with what the leaf old stands
// for, counted from l's base. A marker that has not noticed a new epoch may
// still change old: it marks again afterwards, so that no word may be torn but
// any may be missed.
func (s *nodes) copyLeaf(l, old link) {
	shift := s.nodeBase(l) - s.nodeBase(old)
	to, from := s.data(l.node()), old.data()
	for i := int64(0); i < nodeData; i += 8 {
		w := s.load(from + i)
		if shift != 0 {
			w = lower(w, shift)
		}
		binary.NativeEndian.PutUint64(to[i:], w)
	}
}

// nodeBase and nodeNumber are fields of the header of the node that l names.
func (s *nodes) nodeBase(l link) uint64   { return s.load(l.node().offset() + nodeBase) }
func (s *nodes) nodeNumber(l link) uint64 { return s.load(l.node().offset() + nodeNumber) }

// eachChild calls f for each node that the index l links to.
func (s *nodes) eachChild(l link, f func(node)) {
	for i := int64(0); i < nodeData; i += 8 {
		if c := s.link(l.data() + i); c != 0 {
			f(c.node())
		}
	}
}

// uncountLocked gives one count of a node back.
func (s *nodes) uncountLocked(no node) {
	s.counts[no]--
	if s.counts[no] > 0 {
		return
	}
	s.free = append(s.free, no)
	level := int(s.load(no.offset() + nodeLevel))
	if level == 0 {
		return
	}
	var below []node
	s.eachChild(newLink(no, level, 0), func(c node) { below = append(below, c) })
	if below != nil {
		s.dead = append(s.dead, below)
	}
}

// reap gives back all counts that no reader holds up any more.
func (s *nodes) reap() {
	s.turn()
	for s.reapSome() {
	}
}

// reapSome gives back some counts, and returns false if there are none.
func (s *nodes) reapSome() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for range reapBatch {
		if len(s.dead) == 0 {
			return false
		}
		last := len(s.dead) - 1
		list := s.dead[last]
		no := list[len(list)-1]
		if s.dead[last] = list[:len(list)-1]; len(list) == 1 {
			s.dead = s.dead[:last]
		}
		s.uncountLocked(no)
	}
	return true
}
