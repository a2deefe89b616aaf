package store

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestLowSpace follows what is said while a pool fills and empties.
func TestLowSpace(t *testing.T) {
	const limit = 16 << 20 // 256 slots, low under 128 of them
	p := NewPool(openMem(t, limit))
	said := make(chan LowSpace, 10)
	p.OnLow(func(l LowSpace) { said <- l })
	var slots []Slot
	take := func(n int) {
		for range n {
			slots = append(slots, allocOne(t, p, AllBlocks))
		}
	}
	give := func(n int) {
		for _, s := range slots[:n] {
			p.Free(s, AllBlocks)
		}
		slots = slots[n:]
	}
	wantSaid := func(when string, size int64) {
		t.Helper()
		select {
		case l := <-said:
			if l.Size != size || l.Free >= size/2 || l.Rate <= 0 || l.Left <= 0 || l.Left > time.Minute {
				t.Errorf("%s\n got %+v\nwant size %d, less than half of it free, a rate and the time that is left", when, l, size)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s: nothing was said", when)
		}
	}
	take(128) // the mark itself is not under it
	take(1)
	wantSaid("under the mark", limit)
	take(10)
	give(26) // over the mark, but not by an eighth
	take(20)
	give(30) // by more
	take(40)
	wantSaid("under the mark again", limit)
	const little = 1 << 20 // not enough
	if err := p.Add(openMem(t, little)); err != nil {
		t.Fatal(err)
	}
	wantSaid("still under the mark after a part was added", limit+little)
	if err := p.Add(openMem(t, limit-little)); err != nil {
		t.Fatal(err)
	}
	take(160)
	wantSaid("under the mark of a larger pool", 2*limit)
	p.announce() // as if it was woken once more
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if len(said) != 0 {
		t.Errorf("said once more than wanted: %+v", <-said)
	}
}

// TestOthersFillTheDisk: space that somebody else takes is low space, too.
func TestOthersFillTheDisk(t *testing.T) {
	f := newFaulty(t, 1<<30)
	p := openPool(t, f)
	said := make(chan LowSpace, 1)
	p.OnLow(func(l LowSpace) { said <- l })
	f.avail.Store(60 << 20)
	p.survey(p.ledgers[0])
	if got, want := <-said, (LowSpace{Size: 60 << 20, Free: 60 << 20}); got != want {
		t.Errorf("said\n got %+v\nwant %+v", got, want)
	}
}

func TestLowMark(t *testing.T) {
	const mib = 1 << 20 / BlockSize
	for _, tc := range []struct {
		name       string
		size, want int64
	}{
		{"a tenth", 10_000 * mib, 1000 * mib},
		{"64 MiB at least", 200 * mib, 64 * mib},
		{"half of a small one", 100 * mib, 50 * mib},
		{"nothing", 0, 0},
	} {
		if got := lowMark(tc.size); got != tc.want {
			t.Errorf("%s: mark of %d blocks\n got %d\nwant %d", tc.name, tc.size, got, tc.want)
		}
	}
}

// TestOutlook looks back on a rate that is known.
func TestOutlook(t *testing.T) {
	p := openPool(t, openMem(t, 16<<20))
	now := time.Now()
	p.mu.Lock()
	p.samples = []sample{{now.Add(-4 * time.Second), 0}}
	p.mu.Unlock()
	for range 64 {
		allocOne(t, p, AllBlocks)
	}
	p.mu.Lock()
	got := p.outlook(now)
	p.mu.Unlock()
	want := LowSpace{Size: 16 << 20, Free: 12 << 20, Rate: 1 << 20, Left: 12 * time.Second}
	if got != want {
		t.Errorf("4 MiB in 4 s\n got %+v\nwant %+v", got, want)
	}
	p.mu.Lock()
	p.samples = []sample{{now, 1 << 20}}
	got = p.outlook(now)
	p.mu.Unlock()
	want.Rate, want.Left = 0, 0
	if got != want {
		t.Errorf("when less is in use than was\n got %+v\nwant %+v", got, want)
	}
}

// TestSamples looks back a bounded time.
func TestSamples(t *testing.T) {
	p := openPool(t, openMem(t, 16<<20))
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range 100 {
		p.sampleUsed(now.Add(time.Duration(i) * time.Second))
	}
	if got, want := p.samples[0].at, now.Add((100-maxSamples)*time.Second); len(p.samples) != maxSamples || got != want {
		t.Errorf("samples\n got %d, the oldest of %v\nwant %d, %v", len(p.samples), got, maxSamples, want)
	}
}

// TestWait: whoever waits for space goes on when there is some.
func TestWait(t *testing.T) {
	for _, tc := range []struct {
		name string
		free func(p *Pool, s Slot)
	}{
		{"freed", func(p *Pool, s Slot) { p.Free(s, 3) }},
		{"shrunk", func(p *Pool, s Slot) { p.Shrink(s, 1) }},
		{"added", func(p *Pool, s Slot) {
			if err := p.Add(openMem(t, 1<<20)); err != nil {
				t.Error(err)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := openPool(t, openMem(t, 1<<20))
			s := allocOne(t, p, 3)
			since := p.Freed()
			waited := make(chan error)
			go func() { waited <- p.Wait(t.Context(), since) }()
			eventually(t, "somebody waits", func() bool {
				p.mu.Lock()
				defer p.mu.Unlock()
				return p.wake != nil
			})
			select {
			case err := <-waited:
				t.Fatalf("Wait returned %v before anything was freed", err)
			default:
			}
			tc.free(p, s)
			if err := <-waited; err != nil {
				t.Errorf("Wait: %v", err)
			}
			if err := p.Wait(t.Context(), since); err != nil {
				t.Errorf("Wait for what was freed before: %v", err)
			}
		})
	}
}

func TestWaitEnds(t *testing.T) {
	p := NewPool(openMem(t, 1<<20))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Wait(ctx, p.Freed()); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait with a context that is over\n got %v\nwant %v", err, context.Canceled)
	}
	waited := make(chan error)
	go func() { waited <- p.Wait(t.Context(), p.Freed()) }()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err == nil {
		t.Errorf("Wait of a pool that is closed: no error")
	}
}

// TestRoom allocates exactly as much as there is room for.
func TestRoom(t *testing.T) {
	p := openPool(t, openMem(t, 1<<20), openMem(t, 1<<20))
	allocOne(t, p, 0x0007)
	_, _, free := p.Space()
	room := p.Room()
	if kept := free - room; kept != p.reserve*BlockSize || kept == 0 {
		t.Errorf("room leaves %d bytes of the free %d, want the reserve of %d", kept, free, p.reserve*BlockSize)
	}
	for n := int64(0); n < room; n += BlockSize {
		if len(alloc1(p, 1)) == 0 {
			t.Fatalf("full after %d bytes, want %d", n, room)
		}
	}
	if got := p.Room(); got != 0 || len(alloc1(p, 1)) != 0 {
		t.Errorf("room for %d bytes after all was allocated", got)
	}
}

// TestRoomBeside asks whether another part than a slot's has room.
func TestRoomBeside(t *testing.T) {
	first := newFaulty(t, SlotSize*8)
	p := openPool(t, first)
	s := allocOne(t, p, AllBlocks)
	ask := func(when string, n int64, want bool) {
		t.Helper()
		if got := p.RoomBeside(s, n); got != want {
			t.Errorf("%s: room for %d bytes beside: got %v, want %v", when, n, got, want)
		}
	}
	ask("a single part", BlockSize, false)
	second := newFaulty(t, SlotSize*8)
	if err := p.Add(second); err != nil {
		t.Fatal(err)
	}
	ask("two parts", SlotSize, true)
	ask("two parts", 1, true)
	ask("two parts", 16*SlotSize, true) // one slot is asked for at most
	for len(alloc1(p, AllBlocks)) > 0 {
	}
	ask("all but the reserve is in use", BlockSize, false)
	p.Shrink(s, 0x0007)
	ask("and three blocks came back", 3*BlockSize, true)
	ask("and three blocks came back", 3*BlockSize+1, false)
	p.noteFailure(p.byNo[2].Load(), errors.New("test"))
	ask("second failed", BlockSize, false)
}

// TestHangs has a write hang in a slot that stays in use.
func TestHangs(t *testing.T) {
	f := newFaulty(t, 1<<20)
	p := openPool(t, f, openMem(t, 1<<20))
	s := allocOne(t, p, 1)
	hook, entered, release := gate("write")
	f.set(hook)
	wrote := make(chan error)
	go func() { wrote <- p.WriteAt(s, make([]byte, BlockSize), 0) }()
	<-entered
	p.Hangs(s)
	if got := allocOne(t, p, 1); got.Part() != 2 {
		t.Errorf("slot beside a part that hangs: got %v, want one of part 2", got)
	}
	if err := p.Extend(s, 2); !errors.Is(err, ErrFull) {
		t.Errorf("more blocks of a slot in a part that hangs: got %v, want ErrFull", err)
	}
	close(release)
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	if got := allocOne(t, p, 1); got.Part() != 1 {
		t.Errorf("slot when the part works again: got %v, want one of part 1", got)
	}
	p.Free(s, 1)
}
