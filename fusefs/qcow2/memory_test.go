// What the first look at a file costs.

package qcow2

import (
	"iter"
	"runtime"
	"testing"
	"time"
)

// every yields runs of n bytes, one in each step, of alternating kinds if mixed.
func every(step, n, size int64, mixed bool) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		zero := false
		for off := int64(0); off < size; off += step {
			if !yield(Run{off, min(n, size-off), zero}, nil) {
				return
			}
			zero = zero != mixed
		}
	}
}

// TestMemory counts and measures what files hold: of the worst ones a bit for each
// cluster and kind, of those with few runs a bitmap for each at the most.
func TestMemory(t *testing.T) {
	const size, block = 256 << 30, 64 << 10
	const bitmap, ofTable = size / block / 8, block / 8 / 8
	for _, tc := range []struct {
		name string
		runs iter.Seq2[Run, error]
		most int64 // bytes
	}{
		{"all data", each(Run{0, size, false}), 200},
		{"every other cluster", every(2*block, block, size, false), bitmap * 11 / 10},
		{"every other cluster, data and zero", every(2*block, block, size, true), 2 * bitmap * 11 / 10},
		{"100 runs", every(size/100, size/10000, size, false), 100 * 2 * (ofTable + stretchMemory)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			taken := int64(0)
			before := heap()
			f, _, err := Disk{Size: size, Block: block}.Make(tags{}, tc.runs, func(n int64) error {
				taken += n
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			held := heap() - before
			t.Logf("taken %d bytes, held %d; a bit for each cluster is %d", taken, held, bitmap)
			if taken > tc.most {
				t.Errorf("bytes taken\n got %d\nwant at most %d", taken, tc.most)
			}
			if held > taken+64<<10 {
				t.Errorf("bytes held\n got %d\nwant at most the %d taken and 64 KiB", held, taken)
			}
			runtime.KeepAlive(f)
		})
	}
}

// heap returns how many bytes are allocated and not garbage.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkFirstLook measures and makes files of a device of just under 16 TiB.
func BenchmarkFirstLook(b *testing.B) {
	const size = 16<<40 - 512
	for _, bc := range []struct {
		name       string
		block, gap int64
		n          int64 // bytes of a run
	}{
		{"1000 runs, 1%", 64 << 10, size / 1000, size / 100000},
		{"a million runs", 64 << 10, size >> 20, 256 << 10},
	} {
		d := Disk{Size: size, Block: bc.block}
		runs := every(bc.gap, bc.n, size, false)
		b.Run(bc.name, func(b *testing.B) {
			for b.Loop() {
				start := time.Now()
				measured, err := d.Measure(runs)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(time.Since(start).Microseconds()), "us/stat")
				taken := int64(0)
				f, made, err := d.Make(tags{}, runs, func(n int64) error {
					taken += n
					return nil
				})
				if err != nil || made != measured {
					b.Fatalf("made %v, error %v, measured %v", made, err, measured)
				}
				b.ReportMetric(float64(taken), "bytes")
				runtime.KeepAlive(f)
			}
		})
	}
}
