package store

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestFailedPart: a part that fails gives out nothing more, what it holds can
// still be read, and the other part goes on.
func TestFailedPart(t *testing.T) {
	for _, op := range []string{"read", "write", "punch", "avail"} {
		t.Run(op, func(t *testing.T) {
			f := newFaulty(t, 4<<20)
			p := openPool(t, f, openMem(t, 4<<20))
			b := []byte("content")
			kept, gone := allocOne(t, p, 1), allocOne(t, p, 1)
			if err := p.WriteAt(kept, b, 0); err != nil {
				t.Fatal(err)
			}
			f.set(failing(op, unix.EIO))
			switch op {
			case "read":
				if err := p.ReadAt(kept, make([]byte, 7), 0); !errors.Is(err, unix.EIO) {
					t.Errorf("ReadAt\n got %v\nwant %v", err, unix.EIO)
				}
			case "write":
				if err := p.WriteAt(gone, b, 0); !errors.Is(err, unix.EIO) {
					t.Errorf("WriteAt\n got %v\nwant %v", err, unix.EIO)
				}
			case "punch":
				p.Free(gone, 1)
				if err := p.Discard(); !errors.Is(err, unix.EIO) {
					t.Errorf("Discard\n got %v\nwant %v", err, unix.EIO)
				}
			case "avail":
				p.survey(p.ledgers[0])
			}
			f.set(nil)
			if got, want := p.Parts()[0].State, "failed: "+unix.EIO.Error(); got != want {
				t.Errorf("state\n got %s\nwant %s", got, want)
			}
			if s := allocOne(t, p, 1); s.Part() != 2 {
				t.Errorf("slot beside a failed part\n got %v\nwant one of part 2", s)
			}
			if err := p.Extend(kept, 2); !errors.Is(err, ErrFull) {
				t.Errorf("Extend in a failed part\n got %v\nwant %v", err, ErrFull)
			}
			got := make([]byte, 7)
			if err := p.ReadAt(kept, got, 0); err != nil || string(got) != string(b) {
				t.Errorf("what the failed part holds\n got %q, %v\nwant %q", got, err, b)
			}
			if _, used, free := p.Space(); free != 4<<20-4096 || used < 8192 {
				t.Errorf("space\n got %d used, %d free\nwant only the other part's free", used, free)
			}
			p.Free(kept, 1)
		})
	}
}

// TestHangingPart: a part in which a write hangs is left alone until that ends,
// and Close goes on without a part that hangs.
func TestHangingPart(t *testing.T) {
	f := newFaulty(t, 4<<20)
	p := NewPool(f, openMem(t, 4<<20))
	s := allocOne(t, p, AllBlocks)
	hook, entered, release := gate("write")
	f.set(hook)
	wrote := make(chan error)
	go func() { wrote <- p.WriteAt(s, make([]byte, SlotSize), 0) }()
	<-entered
	p.Quarantine(s)
	if got := allocOne(t, p, AllBlocks); got.Part() != 2 {
		t.Errorf("slot beside a part that hangs\n got %v\nwant one of part 2", got)
	}
	if got, want := p.Parts()[0].State, "failed: it hangs"; got != want {
		t.Errorf("state of a part that hangs\n got %s\nwant %s", got, want)
	}
	if err := p.Check(); err != nil {
		t.Error(err)
	}
	close(release)
	<-wrote
	since := p.Freed()
	p.survey(p.ledgers[0])
	if p.Freed() == since {
		t.Errorf("nobody is told that the part works again")
	}
	since = p.Freed()
	if p.survey(p.ledgers[0]); p.Freed() != since {
		t.Errorf("it is told over and over that the part works again")
	}
	if got := allocOne(t, p, AllBlocks); got == s || got.Part() != 1 {
		t.Errorf("slot when the part works again\n got %v\nwant another than %v of part 1", got, s)
	}
	closing, entered, release2 := gate("close")
	f.set(closing)
	p.closeWait = 500 * time.Millisecond
	err := p.Close()
	if want := "close snapstore mem:4MiB: it hangs"; err == nil || err.Error() != want {
		t.Errorf("Close\n got %v\nwant %s", err, want)
	}
	<-entered
	close(release2)
}

// TestCloseWaitsForTheKeeper: a part is not closed under somebody's hands.
func TestCloseWaitsForTheKeeper(t *testing.T) {
	f := newFaulty(t, 4<<20)
	p := NewPool(f)
	hook, entered, release := gate("avail")
	closing := make(chan struct{})
	f.set(func(op string, off, n int64) error {
		if op == "close" {
			close(closing)
		}
		return hook(op, off, n)
	})
	<-entered
	done := make(chan error)
	go func() { done <- p.Close() }()
	select {
	case <-closing:
		t.Errorf("the part was closed while its keeper used it")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	if err := <-done; err != nil {
		t.Errorf("Close: %v", err)
	}
}

// TestManyAtOnce uses a pool from several goroutines, whose parts are added,
// listed and checked meanwhile.
func TestManyAtOnce(t *testing.T) {
	p := openPool(t, openMem(t, 2<<20), openFile(t, filepath.Join(t.TempDir(), "store"), 8<<20))
	var owner sync.Map
	var workers, watchers sync.WaitGroup
	for g := range 4 {
		workers.Go(func() {
			mine := make(map[Slot]uint16)
			b := []byte(strings.Repeat(fmt.Sprint(g), BlockSize))
			for i := range 3000 {
				mask := [...]uint16{AllBlocks, 1, 0x00f0, 1 << 15}[(i+g)%4]
				for _, s := range alloc1(p, mask) {
					if who, taken := owner.LoadOrStore(s, g); taken {
						t.Errorf("slot %v was given to %d and to %v", s, g, who)
					}
					mine[s] = mask
					if err := p.WriteAt(s, b, int64(firstBlock(mask))*BlockSize); err != nil {
						t.Errorf("WriteAt: %v", err)
					}
				}
				for s, mask := range mine {
					if len(mine) < 20 {
						break
					}
					got := make([]byte, BlockSize)
					if err := p.ReadAt(s, got, int64(firstBlock(mask))*BlockSize); err != nil || string(got) != string(b) {
						t.Errorf("slot %v of %d: %v, or bytes of another", s, g, err)
					}
					owner.Delete(s)
					p.Free(s, mask)
					delete(mine, s)
				}
			}
			for s, mask := range mine {
				owner.Delete(s)
				p.Free(s, mask)
			}
		})
	}
	done := make(chan struct{})
	watchers.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			p.Parts()
			p.Space()
			p.Outlook()
			for range p.InUse() {
			}
			if err := p.Check(); err != nil {
				t.Error(err)
				return
			}
			if err := p.Discard(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	if err := p.Add(openMem(t, 1<<20)); err != nil {
		t.Error(err)
	}
	workers.Wait()
	close(done)
	watchers.Wait()
	wantSpace(t, p, "at the end", 0, 11<<20)
}
