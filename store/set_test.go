package store

import (
	"flag"
	"math/rand/v2"
	"testing"
	"time"
)

var seed = flag.Uint64("seed", uint64(time.Now().UnixNano()), "seed of the random tests")

// newRand returns the random numbers of a test, and says how to get them again.
func newRand(t *testing.T) *rand.Rand {
	t.Logf("repeat with -seed=%d", *seed)
	return rand.New(rand.NewPCG(*seed, 0))
}

// TestSlotSet compares a set with a map, over indexes that fill words and leave
// pages out.
func TestSlotSet(t *testing.T) {
	rng := newRand(t)
	var s slotSet
	model := make(map[int64]bool)
	pick := func() int64 {
		switch rng.IntN(3) {
		case 0:
			return rng.Int64N(200)
		case 1:
			return 70*pageSlots - 100 + rng.Int64N(200)
		}
		return rng.Int64N(200 * pageSlots)
	}
	for op := range 200_000 {
		i := pick()
		switch rng.IntN(5) {
		case 0, 1:
			s.add(i)
			model[i] = true
		case 2:
			s.remove(i)
			delete(model, i)
		case 3:
			if s.has(i) != model[i] {
				t.Fatalf("op %d: has(%d)\n got %v\nwant %v", op, i, s.has(i), model[i])
			}
		case 4:
			if op%100 == 0 {
				checkNext(t, &s, model, i)
			}
		}
		if s.n != int64(len(model)) {
			t.Fatalf("op %d: members\n got %d\nwant %d", op, s.n, len(model))
		}
	}
}

func checkNext(t *testing.T, s *slotSet, model map[int64]bool, from int64) {
	t.Helper()
	want := int64(-1)
	for i := range model {
		if i >= from && (want < 0 || i < want) {
			want = i
		}
	}
	got, ok := s.next(from)
	if !ok {
		got = -1
	}
	if got != want {
		t.Fatalf("next(%d)\n got %d\nwant %d", from, got, want)
	}
}

func TestSlotSetRuns(t *testing.T) {
	var s slotSet
	for _, r := range []struct{ start, n int64 }{{1, 2}, {60, 10}, {100, 40}, {pageSlots - 3, 6}} {
		for i := range r.n {
			s.add(r.start + i)
		}
	}
	for _, tc := range []struct {
		name  string
		want  int
		start int64
		n     int
	}{
		{name: "first run is enough", want: 2, start: 1, n: 2},
		{name: "over the edge of a word", want: 9, start: 60, n: 9},
		{name: "a longer run further on", want: 40, start: 100, n: 40},
		{name: "none is long enough", want: 41, start: 100, n: 40},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if start, n := s.findRun(tc.want); start != tc.start || n != tc.n {
				t.Errorf("findRun(%d)\n got %d members from %d\nwant %d from %d", tc.want, n, start, tc.n, tc.start)
			}
		})
	}
	if start, ok := s.findUnit(); ok {
		t.Errorf("findUnit before there is one\n got %d\nwant none", start)
	}
	for i := range int64(3 * unitSlots) {
		s.add(8*pageSlots + 5 + i)
	}
	if start, ok := s.findUnit(); !ok || start != 8*pageSlots+unitSlots {
		t.Errorf("findUnit\n got %d, %v\nwant %d", start, ok, 8*pageSlots+unitSlots)
	}
}
