package cow

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestInstant has writers that write each number to device after device, the next
// only when the one before was acknowledged. A snapshot that holds a write holds
// all that were acknowledged before it was sent: going through the devices in the
// order in which they are written, the numbers never rise, and the last is at most
// one behind the first.
func TestInstant(t *testing.T) {
	const devices, writers, snapshots = 3, 4, 40
	r := newRig(t, devices, 1<<20, 64<<20)
	var done atomic.Bool
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			p := make([]byte, 8)
			for n := uint64(1); !done.Load(); n++ {
				binary.LittleEndian.PutUint64(p, n)
				for _, d := range r.devs {
					if err := d.Write(p, int64(w)*4096, false); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	for k := range snapshots {
		// In any order of naming, one instant.
		devs := []*Device{r.devs[k%devices], r.devs[(k+1)%devices], r.devs[(k+2)%devices]}
		s, err := r.cat.Take(fmt.Sprint(k), devs, TakeOptions{Limit: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		for w := range writers {
			var numbers []uint64
			for _, d := range r.devs {
				p := make([]byte, 8)
				if err := image(t, s, d.Name()).Read(p, int64(w)*4096); err != nil {
					t.Fatal(err)
				}
				numbers = append(numbers, binary.LittleEndian.Uint64(p))
			}
			for i := 1; i < devices; i++ {
				if numbers[i] > numbers[i-1] || numbers[i]+1 < numbers[0] {
					t.Errorf("snapshot %d holds of writer %d, device after device, the numbers %d", k, w, numbers)
				}
			}
		}
		r.destroy(s)
	}
	done.Store(true)
	writing.Wait()
}

// TestTakesThatCross takes snapshots of overlapping sets at once.
func TestTakesThatCross(t *testing.T) {
	r := newRig(t, 3, 1<<20, 64<<20)
	var takers sync.WaitGroup
	for w := range 4 {
		takers.Go(func() {
			for k := range 25 {
				devs := []*Device{r.devs[(w+1)%3], r.devs[w%3]}
				s, err := r.cat.Take(fmt.Sprintf("%d.%d", w, k), devs, TakeOptions{Limit: time.Minute})
				if err == nil {
					err = s.Destroy(false)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	takers.Wait()
}

// TestTakeEndsBeforeWritesGoOn looks whether a write gets in before the layers of a new
// snapshot are complete: it could break the images, and their layers be closed meanwhile.
func TestTakeEndsBeforeWritesGoOn(t *testing.T) {
	r := newRig(t, 2, 1<<20, 64<<20)
	looked := 0
	r.cat.step = func(what string) {
		if what != "make a snapshot live" && what != "commit a layer" {
			return
		}
		looked++
		for _, d := range r.devs {
			if g, ok := d.writers.tryEnter(); ok {
				d.writers.leave(g)
				t.Errorf("a write gets into %s at %q", d.name, what)
			}
		}
	}
	r.take("s")
	r.cat.step = nil
	if looked != 3 {
		t.Errorf("looked %d times, want 3", looked)
	}
}

func TestTakeRefuses(t *testing.T) {
	r := newRig(t, 1, 1<<20, 1<<20)
	if _, err := r.cat.Take("s", nil, TakeOptions{}); err == nil {
		t.Error("a snapshot of no device was taken")
	}
	if _, err := r.cat.Take("s", []*Device{r.devs[0], r.devs[0]}, TakeOptions{}); err == nil {
		t.Error("a snapshot of the same device twice was taken")
	}
	d := r.addDevice("closed", 1<<20, Config{})
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.cat.Take("s", r.devs, TakeOptions{}); err == nil {
		t.Error("a snapshot of a closed device was taken")
	}
	if err := d.Write([]byte{1}, 0, false); err == nil {
		t.Error("a closed device was written")
	}
	r.devs = r.devs[:1]
}
