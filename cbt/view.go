// What others read: frozen maps and views of the live one.

package cbt

import (
	"encoding/binary"
	"runtime"
	"sync/atomic"

	"github.com/google/uuid"
)

// View is the live map as of when View was called, or later: marks that are
// made up to the next Freeze or Reset get into it, and nothing that comes after.
// Its methods may be called from many goroutines at once, and never wait for a
// marker.
type View struct {
	m        *Map
	t        *tree
	number   uint64 // the last snapshot's
	released atomic.Bool
	cleanup  runtime.Cleanup
}

// Frozen is the map as it was when a snapshot was taken, with what was written
// to images since (see Frozen.Mark).
type Frozen struct{ View }

// View returns the live map as of now: all marks that have returned are in it.
// It takes the same short time whatever the size of the device, and costs
// markers nothing. What the map becomes in the next interval shares memory with
// it until it is released, or unreachable.
func (m *Map) View() *View {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.live.Load()
	t.users++
	v := &View{m: m, t: t, number: t.number - 1}
	v.cleanup = runtime.AddCleanup(v, m.end, t)
	return v
}

// Number is the last snapshot's number; of a frozen map, its own.
func (v *View) Number() uint64 { return v.number }

// Base is what map bytes count from.
func (v *View) Base() uint64 { return v.t.base }

// Generation is the UUID of the generation that the view belongs to.
func (v *View) Generation() uuid.UUID { return v.t.generation }

// Size is the device's size in bytes.
func (v *View) Size() int64 { return v.t.size }

// BlockSize is the size of a tracking block in bytes.
func (v *View) BlockSize() int64 { return 1 << v.t.shift }

// Blocks is how many tracking blocks the device has: the length of the map.
func (v *View) Blocks() int64 { return v.t.blocks() }

// Lost says that a mark is missing, so that Since refuses every question.
func (v *View) Lost() bool { return v.t.isLost() }

// Gone says that the memory of the view was lost (Map.Distrust).
func (v *View) Gone() bool { return v.t.gone() }

// ReadMap fills p with the map's bytes from off on, one for each tracking
// block: the number of its last change less Base, 0 for none since. It returns
// how many there were, 0 from Blocks on, and after Release.
func (v *View) ReadMap(p []byte, off int64) int {
	defer v.t.leave(v.t.enter())
	if v.released.Load() || off < 0 || off >= v.Blocks() {
		return 0
	}
	p = p[:min(int64(len(p)), v.Blocks()-off)]
	for b := off; b < off+int64(len(p)); {
		end := min(off+int64(len(p)), b|(1<<leafBits-1)+1)
		v.t.readLeaf(p[b-off:end-off], b)
		b = end
	}
	if v.Gone() {
		for i := range p {
			p[i] = byte(min(v.t.number-v.t.base, maxByte)) // all changed
		}
	}
	return len(p)
}

// readLeaf fills p with the map's bytes from block on. All are in one leaf.
func (t *tree) readLeaf(p []byte, block int64) {
	l := t.leaf(block)
	if l == 0 {
		clear(p)
		return
	}
	shift := t.base - t.nodeBase(l)
	at := l.data() + block&(1<<leafBits-1)
	for len(p) > 0 {
		w := lower(t.load(at&^7), shift)
		if at&7 == 0 && len(p) >= 8 {
			binary.LittleEndian.PutUint64(p, w)
			p, at = p[8:], at+8
			continue
		}
		p[0] = byte(w >> (at & 7 * 8))
		p, at = p[1:], at+1
	}
}

// Mark marks [off, off+n), in bytes, with number: its own, where its own image
// was written to, or that of an older image that was. One above Number counts
// as that, and one at or below Base needs no mark. Readers need not be kept
// away. Where there is no memory for it the frozen map is Lost when Mark
// returns. After Release it does nothing.
func (f *Frozen) Mark(off, n int64, number uint64) {
	defer f.t.leave(f.t.enter())
	if f.released.Load() {
		return
	}
	from, to := f.t.span(off, n)
	f.t.mark(from, to, number)
}

// Release ends the use of the view, or of the frozen map, whose snapshot was
// destroyed: Open does not find it any more. Memory that only it used is free
// once its readers have come back. A question that was answered is answered to
// its end; what is asked afterwards finds everything changed. Further calls do
// nothing.
func (v *View) Release() {
	if !v.released.CompareAndSwap(false, true) {
		return
	}
	v.cleanup.Stop()
	v.m.end(v.t)
	v.m.reap()
}

// end ends a use of t by a view or a frozen map.
func (m *Map) end(t *tree) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !t.live {
		m.forgetLocked(t)
	}
	m.unuseLocked(t)
}
