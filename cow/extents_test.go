package cow

import (
	"fmt"
	"slices"
	"testing"
)

// list collects runs as text.
func list(t *testing.T, runs func(func(Run, error) bool)) []string {
	t.Helper()
	var s []string
	for r, err := range runs {
		if err != nil {
			t.Fatal(err)
		}
		kind := "data"
		if r.Zero {
			kind = "zero"
		}
		s = append(s, fmt.Sprintf("%d+%d %s", r.Off>>blockShift, r.N>>blockShift, kind))
	}
	return s
}

func wantList(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s, in blocks\n got %q\nwant %q", what, got, want)
	}
}

func TestHolesOfAnImage(t *testing.T) {
	t.Run("in one look", testHolesOfAnImage)
	defer func(n int) { scanWindow = n }(scanWindow)
	scanWindow = 1
	t.Run("chunk by chunk", testHolesOfAnImage)
}

func testHolesOfAnImage(t *testing.T) {
	const block = blockSize
	r := newRig(t, 1, 64*block, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 4*block, 8*block) // data: blocks 4 to 11; chunks 1 to 3 are holes
	i := image(t, r.take("s"), "d0")

	// Afterwards holes are filled, data is changed, data becomes a hole.
	put(t, d, 2, 0, 2*block)
	put(t, d, 2, 20*block, block)
	if err := d.WriteZeroes(8*block, 8*block, zeroFlags{}); err != nil {
		t.Fatal(err)
	}
	wantList(t, "runs of the device", list(t, d.Runs(0, d.Size())),
		"0+2 data", "2+2 zero", "4+4 data", "8+12 zero", "20+1 data", "21+43 zero")
	// Blocks 0, 1 and 12 to 15 of a chunk with data were copied: data is never
	// wrong. Chunk 1, a hole as a whole, stayed one.
	wantList(t, "runs of the image", list(t, i.Runs(0, i.Size())), "0+2 data", "2+2 zero", "4+12 data", "16+48 zero")
	wantList(t, "part of the image", list(t, i.Runs(3*block, 4*block)), "3+1 zero", "4+3 data")
	wantList(t, "all of the image", list(t, i.Changes().All()), "0+2 data", "4+12 data")
	want(t, i, 0, 12*block, 52*block)

	// What was told once stays, whatever the origin does.
	put(t, d, 3, 30*block, block)
	wantList(t, "runs of the image again", list(t, i.Runs(0, i.Size())), "0+2 data", "2+2 zero", "4+12 data", "16+48 zero")
	if n, err := i.Allocated(); err != nil || n != 14*block {
		t.Errorf("allocated: got %d, %v, want %d", n, err, 14*block)
	}
	for _, tc := range []struct{ off, data, hole int64 }{
		{0, 0, 2 * block},
		{block, block, 2 * block},
		{2 * block, 4 * block, 2 * block},
		{5*block + 7, 5*block + 7, 16 * block},
		{63 * block, -1, 63 * block},
		{64 * block, -1, -1},
	} {
		data, err := i.NextData(tc.off)
		if err != nil {
			data = -1
		}
		hole, err := i.NextHole(tc.off)
		if err != nil {
			hole = -1
		}
		if data != tc.data || hole != tc.hole {
			t.Errorf("from %d: got data at %d and a hole at %d, want %d and %d", tc.off, data, hole, tc.data, tc.hole)
		}
	}
}

// TestHoleThatIsFilledMeanwhile fills a hole between the origin's answer and the
// look at the tables, and the other way round.
func TestHoleThatIsFilledMeanwhile(t *testing.T) {
	r := newRig(t, 1, 64*blockSize, 16<<20)
	d, k := r.devs[0], r.disks[0]
	put(t, d, 1, 0, 16*blockSize)
	i := image(t, r.take("s"), "d0")
	entered, release := stop(k.hook, "next", 0)
	got := make(chan []string, 1)
	go func() { got <- list(t, i.Runs(0, i.Size())) }()
	<-entered
	k.hook(nil)
	put(t, d, 2, 16*blockSize, blockSize) // a hole of the image that is data now
	if err := d.WriteZeroes(0, 16*blockSize, zeroFlags{}); err != nil {
		t.Fatal(err)
	}
	close(release)
	wantList(t, "runs of the image", <-got, "0+16 data", "16+48 zero")
}

func TestTrimKeepsWhatImagesNeed(t *testing.T) {
	const block = blockSize
	r := newRig(t, 1, 64*block, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 64*block)
	s := r.take("s")
	i := image(t, s, "d0")
	put(t, d, 2, 4*block, 8*block)
	if err := d.Trim(2*block+100, 20*block, false); err != nil {
		t.Fatal(err)
	}
	if _, used, _ := r.pool.Space(); used != 8*block {
		t.Errorf("a trim spent space in the store: %d bytes in use, want %d", used, 8*block)
	}
	want(t, i, 1, 0, 64*block)
	want(t, d, 1, 2*block, 2*block)
	want(t, d, 0, 4*block, 8*block) // preserved: trimmed
	want(t, d, 1, 12*block, 52*block)
	r.destroy(s)
	if err := d.Trim(0, 64*block, true); err != nil {
		t.Fatal(err)
	}
	want(t, d, 0, 0, 64*block)
	wantList(t, "runs after the trim", list(t, d.Runs(0, d.Size())), "0+64 zero")
}

func TestHolesCostNoSpace(t *testing.T) {
	const size = 8 << 20
	r := newRig(t, 1, size+512, 1<<20)
	d := r.devs[0]
	i := image(t, r.take("s"), "d0")
	put(t, d, 1, 0, size+512)
	if _, used, _ := r.pool.Space(); used != 0 {
		t.Errorf("%d bytes of the store hold holes", used)
	}
	want(t, i, 0, 0, size+512)
}

func TestSince(t *testing.T) {
	const track = 64 << 10
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 512<<10)
	a := r.take("a")
	put(t, d, 2, 3*track, 1)
	if err := d.WriteZeroes(5*track, track, zeroFlags{}); err != nil {
		t.Fatal(err)
	}
	b := r.take("b")
	na, nb := image(t, a, "d0").Changes().Number(), image(t, b, "d0").Changes().Number()
	if nb != na+1 {
		t.Fatalf("numbers %d and %d", na, nb)
	}
	runs, ok := image(t, b, "d0").Changes().Since(na)
	if !ok {
		t.Fatal("b does not know what changed since a")
	}
	wantList(t, "from a to b", list(t, runs), "48+16 data", "80+16 zero")
	runs, _ = image(t, b, "d0").Changes().Since(nb)
	wantList(t, "from b to b", list(t, runs))
	if _, ok := image(t, a, "d0").Changes().Since(nb); ok {
		t.Error("a knows what changed since b, which is newer")
	}
	if err := d.Mark(9*track+5, 1); err != nil {
		t.Fatal(err)
	}
	runs, _ = d.Changes().Since(nb)
	wantList(t, "marked by hand", list(t, runs), "144+16 zero")
	generation := d.Changes().Generation()
	if err := d.Reset("test"); err != nil {
		t.Fatal(err)
	}
	c := d.Changes()
	if c.Generation() == generation || c.Base() != nb+1 || c.Number() != nb+1 {
		t.Errorf("after a reset: generation %s, base %d, number %d; want another than %s, %d, %d", c.Generation(), c.Base(), c.Number(), generation, nb+1, nb+1)
	}
	for _, num := range []uint64{na, nb} {
		if _, ok := c.Since(num); ok {
			t.Errorf("a new generation knows what changed since %d, in the one before", num)
		}
	}
	if !r.event(EventGeneration, "") {
		t.Error("no event told of the new generation")
	}
	for _, bad := range [][2]int64{{-1, 1}, {0, 0}, {0, 1<<20 + 1}, {1 << 20, 1}, {1, 1<<63 - 1}} {
		if err := d.Mark(bad[0], bad[1]); err == nil {
			t.Errorf("range %v was marked", bad)
		}
	}
}
