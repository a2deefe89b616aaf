package cow

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
)

// benchRegions is a record of a device of 1 TiB, on the disk under the temporary directory.
func benchRegions(b *testing.B) *Device {
	b.Helper()
	const size = 1 << 40
	r, err := createRegions(hostDisk{}, filepath.Join(b.TempDir(), "regions"), regionsState{
		size: size, generation: uuid.New(), lease: time.Now().Add(time.Hour).UnixNano(),
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { r.file.Close() })
	d := benchDevice(b, "mem", 1<<20, false)
	d.durable.Store(newDurable(r))
	b.Cleanup(func() { d.durable.Store(nil) }) // it is no record of this device
	return d
}

// BenchmarkRegionRecorded is what the record costs a write in the steady state: its
// region is recorded, and the leases run.
func BenchmarkRegionRecorded(b *testing.B) {
	d := benchRegions(b)
	d.cover(0, 1<<40)
	b.ReportAllocs()
	for n := int64(0); b.Loop(); n++ {
		if !d.covered(n*blockSize*7919&(1<<40-1), blockSize) {
			b.Fatal("a recorded region is not")
		}
	}
}

// BenchmarkRegionNew is what it costs the first write to a region, with 1 and with 32
// writes under way: random writes over a large device just after a checkpoint.
func BenchmarkRegionNew(b *testing.B) {
	for _, at := range []struct {
		name string
		once int
	}{{"1", 1}, {"32", 32}} {
		b.Run(at.name, func(b *testing.B) {
			d := benchRegions(b)
			u := d.durable.Load()
			next := make(chan int64, at.once)
			done := make(chan struct{}, at.once)
			for range at.once {
				go func() {
					for region := range next {
						d.cover(region<<regionShift, blockSize)
						done <- struct{}{}
					}
				}()
			}
			b.Cleanup(func() { close(next) })
			region, under := int64(0), 0
			for b.Loop() {
				if under == at.once {
					<-done
					under--
				}
				if region++; region == u.regions.n {
					region = 0
					for i := range u.regions.recorded {
						u.regions.recorded[i].Store(0)
					}
				}
				next <- region
				under++
			}
			for ; under > 0; under-- {
				<-done
			}
		})
	}
}
