package intercept

import "testing"

// TestPoolBounds fills a pool whose jobs hang: so many run, so many wait, and
// no more are taken; when they go on, all of them are done before close returns.
func TestPoolBounds(t *testing.T) {
	dev, entered, release := gated("flush")
	conn := &tape{}
	s := &session{dev: dev, sender: newSender(conn, 0), lease: &lease{release: nothing}, pool: newPool()}
	q := &request{typ: NBD_CMD_FLUSH}
	jobs := 0
	for {
		if s.lease.enter(); !s.pool.do(newJob(s, q)) {
			break
		}
		if jobs++; jobs <= maxWorkers {
			<-entered // one after the other, so that the queue is empty
		}
	}
	if want := maxWorkers + maxQueue; jobs != want {
		t.Errorf("jobs taken\n got %d\nwant %d", jobs, want)
	}
	waiting := make(chan struct{})
	go func() { s.pool.doWait(newJob(s, q)); close(waiting) }()
	select {
	case <-waiting:
		t.Error("doWait returned although the queue is full")
	default:
	}
	close(release)
	<-waiting
	s.pool.close()
	if got, want := dev.flushes.Load(), int64(maxWorkers+maxQueue+1); got != want {
		t.Errorf("jobs done\n got %d\nwant %d", got, want)
	}
	if got, want := conn.out.Len(), (maxWorkers+maxQueue+1)*simpleReplySize; got != want {
		t.Errorf("bytes of replies\n got %d\nwant %d", got, want)
	}
}
