package cow

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
)

// TestSnapshotsComeAndGo has 10,000 snapshots come and go beside one that stays, as
// hourly ones do beside one that is more than a year old. What the old one reads does
// not get slower, and stays right.
func TestSnapshotsComeAndGo(t *testing.T) {
	const size, kept = 8*chunkSize + 512, 24
	snapshots := 10000
	if racing { // which takes ten times as long, and nothing here is at once
		snapshots = 1000
	}
	rng := newRand(t)
	r := newRig(t, 1, size, 64<<20)
	d := r.devs[0]
	live := bytes.Repeat([]byte{1}, size)
	put(t, d, 1, 0, size)
	type snap struct {
		*Snapshot
		held []byte
	}
	old := snap{r.take("old"), bytes.Clone(live)}
	var recent []snap
	for k := range snapshots {
		recent = append(recent, snap{r.take(fmt.Sprint(k)), bytes.Clone(live)})
		for range 3 {
			off := rng.Int64N(size)
			n := min(1+rng.Int64N(3*blockSize), size-off)
			put(t, d, byte(k), off, n)
			fill(live, byte(k), off, n)
		}
		if len(recent) > kept {
			gone := 0
			if k%3 == 0 { // not always the oldest
				gone = rng.IntN(len(recent))
			}
			r.destroy(recent[gone].Snapshot)
			recent = slices.Delete(recent, gone, gone+1)
		}
		if k%250 != 0 && k != snapshots-1 {
			continue
		}
		// One layer for each image, and a nameless head perhaps.
		if got, want := len(image(t, old.Snapshot, "d0").chain(nil, nil)), len(recent)+2; got > want {
			t.Fatalf("after %d snapshots the old image is looked for in %d layers, want at most %d", k+1, got, want)
		}
		for _, s := range []snap{old, recent[rng.IntN(len(recent))]} {
			wantBytes(t, fmt.Sprintf("image of %s after %d snapshots", s.Name(), k+1), image(t, s.Snapshot, "d0"), s.held)
		}
		if err := Check(r.pool, d); err != nil {
			t.Fatalf("after %d snapshots: %v", k+1, err)
		}
	}
	wantBytes(t, "the device", d, live)
	for _, s := range recent {
		r.destroy(s.Snapshot)
	}
	if got := len(image(t, old.Snapshot, "d0").chain(nil, nil)); got > 2 {
		t.Errorf("alone the old image is looked for in %d layers, want at most 2", got)
	}
	wantBytes(t, "the old image at the end", image(t, old.Snapshot, "d0"), old.held)
}

// TestNamelessHeadIsFolded takes a snapshot after the newest one was destroyed: the
// head that was left nameless is one no more, and goes to the image that reads it,
// which holds it then.
func TestNamelessHeadIsFolded(t *testing.T) {
	const size = 4 * chunkSize
	r := newRig(t, 1, size, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, size)
	old := image(t, r.take("old"), "d0")
	gone := r.take("gone")
	put(t, d, 2, 0, chunkSize)
	r.destroy(gone)
	put(t, d, 3, chunkSize, chunkSize)
	r.take("new")
	if !d.settle(settleLimit) {
		t.Fatal("no end of folding")
	}
	if got := len(old.chain(nil, nil)); got != 2 {
		t.Errorf("the old image is looked for in %d layers, want 2", got)
	}
	if got := old.Holds(); got != 2*chunkSize {
		t.Errorf("the old image holds %d bytes, want %d", got, 2*chunkSize)
	}
	want(t, old, 1, 0, size)
}
