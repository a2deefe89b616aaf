package cow

import "testing"

func TestHoldsAndShares(t *testing.T) {
	const block = blockSize
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 1<<20)
	a := r.take("a")
	put(t, d, 2, 0, 2*block) // only a needs blocks 0 and 1 of before
	b := r.take("b")
	put(t, d, 3, block, 2*block) // a and b need block 2; only b needs block 1
	for _, tc := range []struct {
		s             *Snapshot
		holds, shares int64
	}{
		{a, 2 * block, block},
		{b, block, block},
	} {
		i := image(t, tc.s, "d0")
		if got := i.Holds(); got != tc.holds {
			t.Errorf("%s holds %d, want %d", tc.s.Name(), got, tc.holds)
		}
		if got := i.Shares(); got != tc.shares {
			t.Errorf("%s shares %d, want %d", tc.s.Name(), got, tc.shares)
		}
		_, before, _ := r.pool.Space()
		if tc.s == b {
			r.destroy(b)
			if _, after, _ := r.pool.Space(); before-after != tc.holds {
				t.Errorf("destroying b gave %d bytes back, it held %d", before-after, tc.holds)
			}
			if got := i.Holds() + i.Shares(); got != 0 {
				t.Errorf("a destroyed image holds and shares %d bytes", got)
			}
		}
	}
}

// TestHoldsTheHead destroys the newest snapshot and writes on: what is preserved then, in
// a layer without a name, is held by the snapshot that is left.
func TestHoldsTheHead(t *testing.T) {
	const block = blockSize
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 1<<20)
	a := r.take("a")
	put(t, d, 2, 0, 2*block)
	b := r.take("b")
	put(t, d, 3, 40*block, 3*block)
	r.destroy(b)
	put(t, d, 4, 0, 4*block)
	i := image(t, a, "d0")
	_, used, _ := r.pool.Space()
	if used != 7*block {
		t.Fatalf("%d bytes are in use, want %d", used, 7*block)
	}
	if got := i.Holds(); got != used {
		t.Errorf("the only snapshot holds %d, want all of %d", got, used)
	}
	if got := i.Shares(); got != 0 {
		t.Errorf("the only snapshot shares %d", got)
	}
}
