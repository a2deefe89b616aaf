package cbt

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/uuid"
)

// model is a map in the simplest form: the number of each tracking block's
// last change.
type model struct {
	history
	size    int64
	numbers []uint64
}

// modelBlocks is how many tracking blocks of 4 KiB a model has room for.
const modelBlocks = 1 << 15

func (m *model) clone() *model {
	c := *m
	c.numbers = slices.Clone(m.numbers)
	return &c
}

// mark marks the tracking blocks [from, to) as far as the device goes.
func (m *model) mark(from, to int64, number uint64) {
	for b := from; b < min(to, blocksOf(m.size, minShift)); b++ {
		m.numbers[b] = max(m.numbers[b], min(number, m.number))
	}
}

func (m *model) resize(size int64) {
	was := m.size
	m.size = size
	if size > was {
		m.mark(was>>minShift, blocksOf(size, minShift), m.number)
	}
}

// freeze moves the number on, and the base where bytes end at limit.
func (m *model) freeze(limit uint64) {
	m.number++
	if m.number-m.base > limit {
		m.base = m.number - limit
	}
}

// reset leaves out a number, which is the new base.
func (m *model) reset(generation uuid.UUID) {
	m.number++
	m.generation, m.base = generation, m.number-1
	clear(m.numbers)
}

// bytes is what the map's bytes are.
func (m *model) bytes() []byte {
	bs := make([]byte, blocksOf(m.size, minShift))
	for i := range bs {
		if n := m.numbers[i]; n > m.base {
			bs[i] = byte(n - m.base)
		}
	}
	return bs
}

// since is what changed in [off, off+n) after num.
func (m *model) since(off, n int64, num uint64) [][2]int64 {
	var all [][2]int64
	for b := off >> minShift; b < blocksOf(off+n, minShift); b++ {
		if m.numbers[b] <= num {
			continue
		}
		from, to := max(b<<minShift, off), min((b+1)<<minShift, off+n)
		if k := len(all) - 1; k >= 0 && all[k][0]+all[k][1] == from {
			all[k][1] += to - from
		} else {
			all = append(all, [2]int64{from, to - from})
		}
	}
	return all
}

// wantModel fails unless v says what m does, read in one go and piece by
// piece.
func wantModel(t *testing.T, rng *rand.Rand, what string, v *View, m *model) {
	t.Helper()
	if v.Base() != m.base || v.Generation() != m.generation || v.Size() != m.size || v.Lost() {
		t.Fatalf("%s: base %d, generation %v, size %d, lost %t\nwant %d, %v, %d, false", what,
			v.Base(), v.Generation(), v.Size(), v.Lost(), m.base, m.generation, m.size)
	}
	want, got := m.bytes(), make([]byte, v.Blocks()+1)
	if n := v.ReadMap(got, 0); n != len(want) || !bytes.Equal(got[:n], want) {
		i := 0
		for i < min(n, len(want)) && got[i] == want[i] {
			i++
		}
		t.Fatalf("%s: %d map bytes, want %d; the first %d are right", what, n, len(want), i)
	}
	off := rng.IntN(len(want))
	n := rng.IntN(len(want)-off) + 1
	if k := v.ReadMap(got[:n], int64(off)); k != n || !bytes.Equal(got[:n], want[off:off+n]) {
		t.Fatalf("%s: wrong map bytes in the %d from %d on", what, n, off)
	}
	for num := m.base; num <= v.Number(); num += 1 + (v.Number()-m.base)/4 {
		if got, want := changed(t, v, num), m.since(0, m.size, num); !slices.Equal(got, want) {
			t.Fatalf("%s: since %d\n got %v\nwant %v", what, num, got, want)
		}
		off := rng.Int64N(m.size)
		n := rng.Int64N(m.size-off) + 1
		if got, want := changedIn(t, v, off, n, num), m.since(off, n, num); !slices.Equal(got, want) {
			t.Fatalf("%s: since %d in %d:%d\n got %v\nwant %v", what, num, off, n, got, want)
		}
	}
	for _, num := range []uint64{m.base - 1, v.Number() + 1} {
		if _, ok := v.Since(num); ok {
			t.Fatalf("%s: knows what changed since %d; base %d, number %d", what, num, m.base, v.Number())
		}
	}
}

// life is a map and its frozen maps, beside their models.
type life struct {
	t       *testing.T
	rng     *rand.Rand
	mem     *heap
	limit   uint64
	m       *Map
	live    *model
	frozen  []*Frozen
	models  []*model // of the frozen maps
	deepest int      // most frozen maps at once

	views []seen
}

// seen is a view, what the live map was when it was taken, and what it was at
// the end of that interval, if that has come.
type seen struct {
	v         *View
	low, high *model
}

func newLife(t *testing.T, rng *rand.Rand) *life {
	l := &life{t: t, rng: rng, mem: newHeap(64 << 20), limit: rng.Uint64N(20) + 2}
	number := rng.Uint64N(1000) + 1
	l.live = &model{history{number + 1, number, uuid.New()}, l.size(), make([]uint64, modelBlocks)}
	m, err := New(l.mem, l.live.size, 1<<minShift, l.live.generation, number)
	if err != nil {
		t.Fatal(err)
	}
	m.limit = l.limit
	l.m = m
	return l
}

func (l *life) size() int64 { return l.rng.Int64N(modelBlocks<<minShift/512)*512 + 512 }

// span returns a range inside the device, mostly a short one, and the blocks
// it touches.
func (l *life) span() (off, n, from, to int64) {
	off = l.rng.Int64N(l.live.size)
	n = l.rng.Int64N(min(l.live.size-off, 1<<l.rng.IntN(26))) + 1
	return off, n, off >> minShift, blocksOf(off+n, minShift)
}

func (l *life) step() {
	off, n, from, to := l.span()
	k := l.rng.IntN(100)
	switch {
	case k < 60:
		l.m.Mark(off, n)
		l.live.mark(from, to, l.live.number)
	case k < 65:
		number := l.live.number - l.rng.Uint64N(5)
		l.m.MarkAt(off, n, number)
		l.live.mark(from, to, number)
	case k < 75 && len(l.frozen) > 0:
		l.writeImage(l.rng.IntN(len(l.frozen)), off, n)
	case k < 85:
		l.endInterval()
		l.frozen = append(l.frozen, freeze(l.t, l.m))
		l.models = append(l.models, l.live.clone())
		l.live.freeze(l.limit)
		l.deepest = max(l.deepest, len(l.frozen))
	case k < 93 && len(l.frozen) > 0:
		i := l.rng.IntN(len(l.frozen))
		l.frozen[i].Release()
		l.frozen = slices.Delete(l.frozen, i, i+1)
		l.models = slices.Delete(l.models, i, i+1)
	case k < 94:
		size := l.size()
		if err := l.m.Resize(size); err != nil {
			l.t.Fatal(err)
		}
		l.live.resize(size)
	case k == 94 && l.rng.IntN(10) == 0:
		l.endInterval()
		l.live.reset(uuid.New())
		l.m.Reset(l.live.generation)
	case k == 95:
		l.views = append(l.views, seen{v: l.m.View(), low: l.live.clone()})
		if len(l.views) > 3 {
			l.closeView()
		}
	case k == 96:
		l.reopen()
	case k == 97:
		var views []*View
		for _, s := range l.views {
			views = append(views, s.v)
		}
		checkCounts(l.t, l.m, views...)
	}
}

// writeImage marks as a write to the image of the i-th frozen map does.
func (l *life) writeImage(i int, off, n int64) {
	number := l.frozen[i].Number()
	from, to := off>>minShift, blocksOf(off+n, minShift)
	for j, f := range l.frozen[i:] {
		f.Mark(off, n, number)
		l.models[i+j].mark(from, to, number)
		number = l.frozen[i].Number() + 1
	}
	l.m.MarkAt(off, n, number)
	l.live.mark(from, to, number)
}

// endInterval notes what views may have seen.
func (l *life) endInterval() {
	for i := range l.views {
		if s := &l.views[i]; s.high == nil {
			s.high = l.live.clone()
		}
	}
}

// closeView checks the oldest view and releases it.
func (l *life) closeView() {
	s := l.views[0]
	l.views = l.views[1:]
	if s.high == nil {
		s.high = l.live
	}
	between(l.t, "view", s.v, s.low, s.high)
	s.v.Release()
}

// reopen lets another process go on, and checks what it finds.
func (l *life) reopen() {
	for len(l.views) > 0 {
		l.closeView()
	}
	l.m.Close()
	m, frozen, err := Open(l.mem)
	if err != nil {
		l.t.Fatal(err)
	}
	m.limit = l.limit
	l.m, l.frozen = m, frozen
	l.check()
}

func (l *life) check() {
	l.t.Helper()
	if len(l.frozen) != len(l.models) {
		l.t.Fatalf("%d frozen maps, want %d", len(l.frozen), len(l.models))
	}
	for i, f := range l.frozen {
		if f.Number() != l.models[i].number {
			l.t.Fatalf("frozen map %d has number %d, want %d", i, f.Number(), l.models[i].number)
		}
		wantModel(l.t, l.rng, fmt.Sprintf("frozen map %d", f.Number()), &f.View, l.models[i])
	}
	v := l.m.View()
	defer v.Release()
	if v.Number() != l.live.number-1 {
		l.t.Fatalf("number %d, want %d", v.Number(), l.live.number-1)
	}
	wantModel(l.t, l.rng, "live map", v, l.live)
}

// TestModel compares long random lives of a map with a plain model: marks,
// image writes, snapshots, releases, base moves, resizes, resets, views and
// new processes.
func TestModel(t *testing.T) {
	rng := random(t)
	for round := range 4 {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			l := newLife(t, rng)
			for range 1500 {
				l.step()
			}
			l.reopen()
			closeMap(t, l.m)
			t.Logf("number %d, base %d, at most %d frozen maps at once, %d nodes",
				l.m.Number(), l.m.Base(), l.deepest, len(l.m.counts))
		})
	}
}

// TestNumbersNeverEnd takes thousands of snapshots with bytes up to 255 and
// with far fewer, and keeps some for long.
func TestNumbersNeverEnd(t *testing.T) {
	rng := random(t)
	for _, limit := range []uint64{1, 2, 128, 255} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			l := newLife(t, rng)
			l.limit, l.m.limit = limit, limit
			generation := l.live.generation
			for i := range 3000 {
				off, n, from, to := l.span()
				l.m.Mark(off, min(n, 64<<10))
				l.live.mark(from, min(to, blocksOf(off+64<<10, minShift)), l.live.number)
				f := freeze(t, l.m)
				if i%500 == 0 {
					l.frozen, l.models = append(l.frozen, f), append(l.models, l.live.clone())
				} else {
					f.Release()
				}
				l.live.freeze(limit)
			}
			l.check()
			closeMap(t, l.m)
			if got := l.m.Generation(); got != generation {
				t.Errorf("generation %v, want %v", got, generation)
			}
			// 254 older snapshots can be asked for, less where bytes are fewer.
			if got := l.m.Number() - l.m.Base(); got != limit-1 {
				t.Errorf("history of %d snapshots, want %d", got, limit-1)
			}
		})
	}
}
