package cbt

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// crowd is a map that many goroutines use at once, and what they noted about
// it.
type crowd struct {
	t    *testing.T
	m    *Map
	gate sync.RWMutex // held by marks, and exclusively by Freeze

	mu     sync.Mutex
	frozen []*Frozen // by number
}

const (
	crowdSize  = 256 << 20
	crowdMarks = 3000 // of each writer

	// Image writes go beyond crowdImages, so that below it the map must say
	// exactly what the writers noted.
	crowdImages = crowdSize / 2
)

// note is a mark that a writer made: the blocks [from, to) with number.
type note struct {
	from, to int64
	number   uint64
}

// TestConcurrentMarks lets writers, image writers, snapshots, releases and
// views run into one another, and then finds every mark in the live map and in
// each frozen map that was taken after it, and nothing else.
func TestConcurrentMarks(t *testing.T) {
	rng := random(t)
	mem := newHeap(64 << 20)
	c := &crowd{t: t, m: newTestMap(t, mem, crowdSize)}
	c.m.limit = 20

	var notes [4][]note
	var writers, others sync.WaitGroup
	for i := range notes {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 1))
		writers.Go(func() { notes[i] = c.write(rng) })
	}
	done := make(chan struct{})
	for _, f := range []func(rng *rand.Rand){c.snapshot, c.writeImage, c.view} {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 2))
		others.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					f(rng)
				}
			}
		})
	}
	writers.Wait()
	close(done)
	others.Wait()

	all := slices.Concat(notes[:]...)
	v := c.m.View()
	defer v.Release()
	c.check("live map", v, all, c.m.Number()+1)
	for _, f := range c.frozen {
		c.check("frozen map", &f.View, all, f.Number())
	}
	t.Logf("number %d, %d frozen maps, %d nodes", c.m.Number(), len(c.frozen), len(c.m.counts))
}

// write marks, notes, and now and then looks for its own mark in a view.
func (c *crowd) write(rng *rand.Rand) (notes []note) {
	for i := range crowdMarks {
		off := rng.Int64N(crowdSize)
		n := min(rng.Int64N(64<<10)+1, crowdSize-off)
		c.gate.RLock()
		number := c.m.Number() + 1
		c.m.Mark(off, n)
		c.gate.RUnlock()
		notes = append(notes, note{off >> minShift, blocksOf(off+n, minShift), number})
		if i%100 > 0 {
			continue
		}
		v := c.m.View()
		if got := numberOf(v, off>>minShift); v.Base() < number && got < number {
			c.t.Errorf("a view that was taken after a mark with %d found %d", number, got)
		}
		v.Release()
	}
	return notes
}

// snapshot takes one, and releases some other.
func (c *crowd) snapshot(rng *rand.Rand) {
	if err := c.m.Prepare(); err != nil {
		c.t.Error(err)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gate.Lock()
	f, err := c.m.Freeze()
	c.gate.Unlock()
	if err != nil {
		c.t.Error(err)
		return
	}
	c.frozen = append(c.frozen, f)
	if len(c.frozen) > 8 {
		i := rng.IntN(len(c.frozen))
		c.frozen[i].Release()
		c.frozen = slices.Delete(c.frozen, i, i+1)
	}
}

// writeImage marks in frozen maps that may be released meanwhile, and in the
// live map outside the gate.
func (c *crowd) writeImage(rng *rand.Rand) {
	c.mu.Lock()
	frozen := slices.Clone(c.frozen)
	c.mu.Unlock()
	off := crowdImages + rng.Int64N(crowdSize-crowdImages)
	for i, f := range frozen {
		f.Mark(off, 4096, frozen[0].Number()+uint64(min(i, 1)))
	}
	if len(frozen) > 0 {
		c.m.MarkAt(off, 4096, frozen[0].Number()+1)
	}
}

// view reads a view and a frozen map that may be released meanwhile.
func (c *crowd) view(rng *rand.Rand) {
	v := c.m.View()
	defer v.Release()
	views := []*View{v}
	c.mu.Lock()
	if len(c.frozen) > 0 {
		views = append(views, &c.frozen[rng.IntN(len(c.frozen))].View)
	}
	c.mu.Unlock()
	for _, v := range views {
		v.ReadMap(make([]byte, v.Blocks()), 0)
		runs, ok := v.Since(v.Number() - min(v.Number()-v.Base(), 3))
		if !ok {
			c.t.Errorf("recent changes refused; base %d, number %d", v.Base(), v.Number())
			continue
		}
		end := int64(-1)
		for off, n := range runs {
			if off <= end || n <= 0 {
				c.t.Errorf("run %d:%d after one that ends at %d", off, n, end)
			}
			end = off + n
		}
	}
}

// numberOf is the number of block's last change, at least v's base.
func numberOf(v *View, block int64) uint64 {
	var p [1]byte
	v.ReadMap(p[:], block)
	return v.Base() + uint64(p[0])
}

// check compares v, which marks with up to number went into, with the notes.
func (c *crowd) check(what string, v *View, notes []note, number uint64) {
	c.t.Helper()
	want := slices.Repeat([]uint64{v.Base()}, int(v.Blocks()))
	for _, n := range notes {
		for b := n.from; b < n.to && n.number <= number; b++ {
			want[b] = max(want[b], n.number)
		}
	}
	for b, want := range want {
		got := numberOf(v, int64(b))
		if got < want || got > want && b < crowdImages>>minShift {
			c.t.Fatalf("%s %d: block %d has number %d, want %d", what, number, b, got, want)
		}
	}
}
