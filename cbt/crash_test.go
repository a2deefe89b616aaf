package cbt

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/uuid"
)

// state is what a map and its frozen maps are, in the simplest form.
type state struct {
	live   *model
	frozen map[uint64]*model // by number
}

func (s state) clone() state {
	c := state{s.live.clone(), make(map[uint64]*model)}
	for number, m := range s.frozen {
		c.frozen[number] = m.clone()
	}
	return c
}

// crashed is a map whose process is killed after each change of a word.
type crashed struct {
	t      *testing.T
	mem    *heap
	m      *Map
	frozen map[uint64]*Frozen
	kills  int
}

const (
	crashSize  = 2 * leafSpan // at first
	crashMarks = 40 << minShift
)

// TestCrash kills the process after each change of a word that a long random
// life makes. What is found then is the state before the operation or after
// it, or a part of its marks; never less than what was done before, and never
// more than was asked for.
func TestCrash(t *testing.T) {
	rng := random(t)
	live := &model{history{8, 7, uuid.New()}, crashSize, make([]uint64, modelBlocks)}
	c := &crashed{t: t, mem: newHeap(4 << 20), frozen: make(map[uint64]*Frozen)}
	m, err := New(c.mem, live.size, block, live.generation, live.base)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMap(t, m) })
	c.m, m.limit = m, 5

	before := state{live, make(map[uint64]*model)}
	for i := range 400 {
		after := before.clone()
		what, do := c.plan(rng, after)
		m.stepped = func() { c.kill(fmt.Sprintf("operation %d, %s", i, what), before, after) }
		do()
		m.stepped()
		m.stepped = nil
		before = after
	}
	c.kill("end", before, before)
	t.Logf("killed %d times", c.kills)
}

// plan returns an operation, and changes s to what it leads to.
func (c *crashed) plan(rng *rand.Rand, s state) (what string, do func()) {
	off := rng.Int64N(s.live.size)
	n := rng.Int64N(min(s.live.size-off, crashMarks)) + 1
	from, to := off>>minShift, blocksOf(off+n, minShift)
	numbers := slices.Sorted(maps.Keys(s.frozen))
	switch k := rng.IntN(100); {
	case k < 40:
		s.live.mark(from, to, s.live.number)
		return "mark", func() { c.m.Mark(off, n) }
	case k < 50:
		number := s.live.number - 1
		s.live.mark(from, to, number)
		return "mark at", func() { c.m.MarkAt(off, n, number) }
	case k < 60 && len(numbers) > 0:
		number := numbers[rng.IntN(len(numbers))]
		s.frozen[number].mark(from, to, number)
		return "mark frozen", func() { c.frozen[number].Mark(off, n, number) }
	case k < 80 && len(numbers) < 5:
		number := s.live.number
		s.frozen[number] = s.live.clone()
		s.live.freeze(5)
		return "freeze", func() { c.frozen[number] = freeze(c.t, c.m) }
	case k < 90 && len(numbers) > 0:
		number := numbers[rng.IntN(len(numbers))]
		delete(s.frozen, number)
		return "release", func() { c.frozen[number].Release() }
	case k < 93:
		size := (rng.Int64N(2*crashSize) + 512) &^ 511
		// Growing makes a step for each eight tracking blocks.
		size = min(size, s.live.size+crashMarks)
		s.live.resize(size)
		return "resize", func() {
			if err := c.m.Resize(size); err != nil {
				c.t.Fatal(err)
			}
		}
	case k < 95:
		generation := uuid.New()
		s.live.reset(generation)
		return "reset", func() { c.m.Reset(generation) }
	default:
		return "view", func() { c.m.View().Release() }
	}
}

// kill opens what is left now.
func (c *crashed) kill(what string, before, after state) {
	c.kills++
	m, frozen, err := Open(copyHeap(c.mem))
	if err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
	var numbers []uint64
	for _, f := range frozen {
		numbers = append(numbers, f.number)
		between(c.t, what, &f.View, before.frozen[f.number], after.frozen[f.number])
	}
	if !slices.Equal(numbers, slices.Sorted(maps.Keys(before.frozen))) &&
		!slices.Equal(numbers, slices.Sorted(maps.Keys(after.frozen))) {
		c.t.Fatalf("%s: frozen maps %v", what, numbers)
	}
	v := m.View()
	old, now := before.live, after.live
	if v.number+1 != old.number || v.Generation() != old.generation {
		old = nil
	}
	if v.number+1 != now.number || v.Generation() != now.generation {
		now = nil
	}
	between(c.t, what, v, old, now)
	v.Release()
	checkCounts(c.t, m)
}

// between fails unless v says at least what low does and at most what high
// does. One of them may be missing, where the map is only in the other's state.
func between(t *testing.T, what string, v *View, low, high *model) {
	t.Helper()
	if low == nil {
		low = high
	}
	if high == nil {
		high = low
	}
	if low == nil || v.Base() != low.base || v.Size() != low.size && v.Size() != high.size || v.Lost() {
		t.Fatalf("%s: map with number %d, base %d, size %d, lost %t, is in no state it was ever in",
			what, v.Number(), v.Base(), v.Size(), v.Lost())
	}
	bytes := make([]byte, v.Blocks())
	v.ReadMap(bytes, 0)
	for b, got := range bytes {
		least, most := max(low.numbers[b], v.Base()), max(high.numbers[b], v.Base())
		if number := v.Base() + uint64(got); number < least || number > most {
			t.Fatalf("%s: map with number %d: block %d has number %d, want %d to %d", what, v.Number(), b, number, least, most)
		}
	}
}

// TestCrashInNew kills the process after each change of a word that making a
// map takes: there is none, or a complete one.
func TestCrashInNew(t *testing.T) {
	mem := newHeap(1 << 20)
	m := newMap(mem, minShift)
	steps, found := 0, 0
	m.stepped = func() {
		steps++
		switch _, _, err := Open(copyHeap(mem)); {
		case err == nil:
			found++
		case !errors.Is(err, ErrNoMap) || found > 0:
			t.Errorf("step %d: %v", steps, err)
		}
	}
	if err := m.begin(crashSize, history{number: 1, generation: uuid.New()}); err != nil {
		t.Fatal(err)
	}
	if found != 1 {
		t.Errorf("found a map after %d of %d steps, want only after the last", found, steps)
	}
}

// TestCrashInManyFreezes kills the process after each change of a word while so
// many snapshots are taken that their records fill more than one table.
func TestCrashInManyFreezes(t *testing.T) {
	mem := newHeap(1 << 20)
	m := newTestMap(t, mem, leafSpan)
	for i := range 2*nodeData/recordSize + 2 {
		kill := func() {
			_, frozen, err := Open(copyHeap(mem))
			if err != nil {
				t.Fatalf("during snapshot %d: %v", i+1, err)
			}
			if n := len(frozen); n != i && n != i+1 {
				t.Fatalf("%d frozen maps during snapshot %d", n, i+1)
			}
		}
		m.stepped = kill
		freeze(t, m)
		m.stepped = nil
	}
}
