package cbt

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/uuid"
)

var seed = flag.Uint64("seed", 0, "seed of the random tests; 0: a new one")

// random returns a source of random numbers and says how to get it again.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("repeat with -seed=%d", s)
	return rand.New(rand.NewPCG(s, 0))
}

// history of a plain model: the number of each tracking block's last change.
type modelMap struct {
	history
	size    int64
	numbers []uint64
}

func (m modelMap) clone() modelMap {
	m.numbers = slices.Clone(m.numbers)
	return m
}

// mark marks whole tracking blocks [from, to).
func (m *modelMap) mark(from, to int64, number uint64) {
	for b := from; b < min(to, blocksOf(m.size, minShift)); b++ {
		m.numbers[b] = max(m.numbers[b], min(number, m.number))
	}
}

// wantMap fails unless v says what the model does.
func wantMap(t *testing.T, what string, v *View, want modelMap) {
	t.Helper()
	blocks := blocksOf(want.size, minShift)
	bs := make([]byte, blocks)
	for i := range bs {
		if n := want.numbers[i]; n > want.base {
			bs[i] = byte(n - want.base)
		}
	}
	got := make([]byte, blocks+1)
	if n := v.ReadMap(got, 0); int64(n) != blocks || !bytes.Equal(got[:blocks], bs) {
		i := 0
		for i < int(blocks) && got[i] == bs[i] {
			i++
		}
		t.Fatalf("%s: map of %d bytes differs at block %d\n got %d\nwant %d of %d", what, n, i, got[i], bs[i], blocks)
	}
	for num := want.base; num <= v.Number(); num++ {
		wantSince(t, what, v, want, num)
	}
	if _, ok := v.Since(v.Number() + 1); ok {
		t.Errorf("%s: changes after number %d, of %d", what, v.Number()+1, v.Number())
	}
	if _, ok := v.Since(want.base - 1); ok {
		t.Errorf("%s: changes after number %d, below the base", what, want.base-1)
	}
}

func wantSince(t *testing.T, what string, v *View, m modelMap, num uint64) {
	t.Helper()
	var want [][2]int64
	for b := int64(0); b < blocksOf(m.size, minShift); b++ {
		if m.numbers[b] <= num {
			continue
		}
		off := b << minShift
		end := min(off+1<<minShift, m.size)
		if k := len(want) - 1; k >= 0 && want[k][0]+want[k][1] == off {
			want[k][1] = end - want[k][0]
		} else {
			want = append(want, [2]int64{off, end - off})
		}
	}
	runs, ok := v.Since(num)
	if !ok {
		t.Fatalf("%s: no changes since %d; base %d, number %d", what, num, v.Base(), v.Number())
	}
	var got [][2]int64
	for off, n := range runs {
		got = append(got, [2]int64{off, n})
	}
	if !slices.Equal(got, want) {
		t.Fatalf("%s: since %d\n got %v\nwant %v", what, num, got, want)
	}
}

// TestModel compares long random lives of a map with a plain model.
func TestModel(t *testing.T) {
	rng := random(t)
	for round := range 6 {
		t.Run(fmt.Sprint(round), func(t *testing.T) { runModel(t, rng) })
	}
}

func runModel(t *testing.T, rng *rand.Rand) {
	mem := newHeap(64 << 20)
	limit := uint64(rng.IntN(20) + 2)
	first := rng.Uint64N(1000) + 1
	live := modelMap{history{first + 1, first, uuid.New()}, int64(rng.IntN(40<<20)+512) &^ 511, make([]uint64, 1<<15)}
	m := newTestMap(t, mem, live.size, 1<<minShift, live.generation, first)
	m.limit = limit
	type frozenPair struct {
		f     *Frozen
		model modelMap
	}
	var frozen []frozenPair
	for op := range 3000 {
		off := rng.Int64N(live.size)
		n := rng.Int64N(min(live.size-off, 1<<rng.IntN(24))) + 1
		from, to := off>>minShift, blocksOf(off+n, minShift)
		switch k := rng.IntN(100); {
		case k < 60:
			m.Mark(off, n)
			live.mark(from, to, live.number)
		case k < 65:
			number := live.number - rng.Uint64N(5)
			m.MarkAt(off, n, number)
			live.mark(from, to, number)
		case k < 75 && len(frozen) > 0:
			i := rng.IntN(len(frozen))
			number := frozen[i].f.Number()
			for _, p := range frozen[i:] {
				p.f.Mark(off, n, number)
				if blocks := blocksOf(p.model.size, minShift); from < blocks {
					p.model.mark(from, to, number)
				}
				number = frozen[i].f.Number() + 1
			}
		case k < 85:
			if err := m.Prepare(); err != nil {
				t.Fatal(err)
			}
			f, err := m.Freeze()
			if err != nil {
				t.Fatal(err)
			}
			frozen = append(frozen, frozenPair{f, live.clone()})
			live.number++
			if live.number-live.base > limit {
				live.base = live.number - limit
			}
		case k < 93 && len(frozen) > 0:
			i := rng.IntN(len(frozen))
			frozen[i].f.Release()
			frozen = slices.Delete(frozen, i, i+1)
		case k < 94:
			size := int64(rng.IntN(80<<20)+512) &^ 511
			if err := m.Resize(size); err != nil {
				t.Fatal(err)
			}
			was := live.size
			live.size = size
			if size > was {
				live.mark(was>>minShift, blocksOf(size, minShift), live.number)
			}
		case k == 94 && op%10 == 0:
			live.generation, live.base = uuid.New(), live.number-1
			clear(live.numbers)
			m.Reset(live.generation)
		case k == 95:
			v := m.View()
			wantMap(t, "view", v, live)
			v.Release()
		case k == 96 && len(frozen) > 0:
			p := frozen[rng.IntN(len(frozen))]
			wantMap(t, "frozen", &p.f.View, p.model)
		}
	}
	for _, p := range frozen {
		wantMap(t, "frozen", &p.f.View, p.model)
	}
	t.Logf("number %d, base %d, %d frozen maps, %d nodes", m.Number(), m.Base(), len(frozen), len(m.counts))
}
