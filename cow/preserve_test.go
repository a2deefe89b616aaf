package cow

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestOverflowOfOneChunkOfAWrite has a write that finds no room for its first chunk,
// which only the newer snapshot needs, and room for its second, which both need. Only
// the newer one may break.
func TestOverflowOfOneChunkOfAWrite(t *testing.T) {
	const block = int64(blockSize)
	r := newRig(t, 1, 8<<20, 1<<20)
	d := r.devs[0]
	put(t, d, 1, 0, d.Size())
	older := r.take("older")
	put(t, d, 2, 0, chunkSize) // the older one has the first chunk
	newer := r.take("newer")
	const kept = 256 << 10 // of the store, for folding
	at := int64(2 * chunkSize)
	for _, _, free := r.pool.Space(); free > kept+5*block; _, _, free = r.pool.Space() {
		put(t, d, 3, at, block)
		at += block
	}
	if got := states(older, newer); got != "ok ok" {
		t.Fatalf("states before: got %s, want ok ok", got)
	}
	put(t, d, 4, 0, chunkSize+block)
	if got, want := states(older, newer), "ok overflowed"; got != want {
		t.Errorf("states: got %s, want %s", got, want)
	}
	want(t, image(t, older, "d0"), 1, 0, d.Size())
}

// TestPreserveElsewhere has a part of the snapstore fail or hang in what is preserved
// of a block. Where another part takes it the snapshot lives, and the write does not
// wait for longer than the limit.
func TestPreserveElsewhere(t *testing.T) {
	const block, limit = int64(blockSize), 10 * time.Second
	for _, tc := range []struct {
		name  string
		parts string // of each part: f fails, h hangs, s is slow, . is sound
		used  bool   // the chunk has a slot in the first part already
		reads bool   // reading is as writing
		want  string // the snapshot's state
		after time.Duration
	}{
		{"the first hangs", "h.", false, false, "ok", limit / 2},
		{"two hang", "hh.", false, false, "ok", 3 * limit / 4},
		{"all hang", "hh", false, false, "failed", limit},
		{"the only one hangs", "h", false, false, "failed", limit},
		{"the only one is slow", "s", false, false, "ok", 8 * time.Second},
		{"the first fails", "f.", false, false, "ok", 0},
		{"many fail", "ffffffff.", false, false, "ok", 0},
		{"all fail", "fff", false, false, "overflowed", 0},
		{"some fail and some hang", "fhf.", false, false, "ok", limit / 2},
		{"the chunk's slot hangs", "h.", true, false, "ok", limit / 2},
		{"the chunk's slot hangs for readers, too", "h.", true, true, "failed", limit},
		{"the chunk's slot fails", "f.", true, false, "ok", 0},
		{"the chunk's slot fails for readers, too", "f.", true, true, "failed", 0},
	} {
		t.Run(tc.name, inBubble(func(t *testing.T) {
			r := newEmptyRig(t)
			for range tc.parts {
				r.add(1<<20, true)
			}
			d := r.addDevice("d0", 1<<20, Config{PreserveLimit: limit})
			put(t, d, 1, 0, 1<<20)
			s := r.take("s")
			if tc.used {
				put(t, d, 2, 0, block)
			}
			release := make(chan struct{})
			for k, what := range tc.parts {
				if what == '.' {
					continue
				}
				r.parts[k].hook(func(op string, _, _ int64) error {
					switch {
					case op == "read" && !tc.reads:
					case what == 'f':
						return errIO
					case what == 's':
						time.Sleep(8 * time.Second)
					default:
						<-release
					}
					return nil
				})
			}
			begun := time.Now()
			put(t, d, 2, 5*block, block)
			if got := time.Since(begun); got != tc.after {
				t.Errorf("the write took %v, want %v", got, tc.after)
			}
			if got := states(s); got != tc.want {
				t.Errorf("state: got %q, want %s", s.State(), tc.want)
			}
			for _, p := range r.parts {
				p.hook(nil)
			}
			close(release)
			synctest.Wait()
			if tc.want == "ok" {
				want(t, image(t, s, "d0"), 1, 0, 1<<20)
			}
			d.settle(time.Minute)
			r.stuck = block * int64(strings.Count(tc.parts, "h"))
		}))
	}
}

// TestHungPartIsLeft has a part hang in a block that is added to a slot: the next
// writes go to another part at once.
func TestHungPartIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const block = int64(blockSize)
		r := newEmptyRig(t)
		r.add(1<<20, true)
		r.add(1<<20, true)
		d := r.addDevice("d0", 1<<20, Config{})
		put(t, d, 1, 0, 1<<20)
		s := r.take("s")
		put(t, d, 2, 0, block)
		_, release := stop(r.parts[0].hook, "write", 5*block)
		put(t, d, 2, 5*block, block)
		begun := time.Now()
		put(t, d, 2, chunkSize, 3*chunkSize)
		if got := time.Since(begun); got != 0 {
			t.Errorf("the next write took %v, want 0", got)
		}
		close(release)
		want(t, image(t, s, "d0"), 1, 0, 1<<20)
		r.stuck = block
	})
}
