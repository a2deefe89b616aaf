// A connection from its acceptance to its end.

package intercept

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"
)

// connection is an open connection in either phase.
type connection struct {
	server *Server
	conn   net.Conn      // the socket, also where TLS runs over it
	number uint64        // of connections, in the order of their acceptance
	done   chan struct{} // closed when the connection has ended

	// Protected by server.mu. The last two are set when the session begins.
	client string
	export string
	lease  *lease

	// dropped are the exports that Disconnect was called for since this
	// connection, in its handshake, began to open one. Protected by server.mu.
	dropped []string
}

// start serves conn on a goroutine of its own. If there are too many connections it
// takes the place of the one that has been in its handshake for longest, so that
// silent strangers cannot keep out who has something to say; if none is, it is
// closed.
func (s *Server) start(conn net.Conn, mustTLS bool) {
	c := &connection{server: s, conn: conn, client: describePeer(conn), done: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	full := len(s.conns) >= s.opts.MaxConns
	if full {
		full = !s.evictLocked()
	}
	if full || s.stopping.Load() {
		conn.Close()
		if full && !s.full { // once, not for each of a flood
			s.opts.Log.Warn("too many connections: refusing more", "open", len(s.conns), "client", c.client)
		}
		s.full = full
		return
	}
	s.full = false
	s.accepted++
	c.number = s.accepted
	s.conns[c] = struct{}{}
	go c.serve(mustTLS)
}

// evictLocked cuts off the connection that has been in its handshake for longest,
// and returns false if none is.
func (s *Server) evictLocked() bool {
	var oldest *connection
	for c := range s.conns {
		if c.lease == nil && (oldest == nil || c.number < oldest.number) {
			oldest = c
		}
	}
	if oldest == nil {
		return false
	}
	oldest.conn.Close()
	delete(s.conns, oldest)
	return true
}

// serve runs both phases.
func (c *connection) serve(mustTLS bool) {
	s := c.server
	defer func() {
		c.conn.Close()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		close(c.done)
	}()

	ctx, cancel := context.WithTimeout(s.ctx, s.opts.HandshakeTimeout)
	defer cancel()
	deadline, _ := ctx.Deadline()
	c.conn.SetDeadline(deadline)
	if s.stopping.Load() {
		return // Shutdown's deadline may have come before ours
	}
	h := &handshake{server: s, conn: c.conn, out: bufio.NewWriter(c.conn), client: c.client, connection: c, mustTLS: mustTLS}
	if err := h.run(ctx); err != nil {
		level := slog.LevelInfo
		if errors.Is(err, errAborted) || errors.Is(err, io.EOF) {
			level = slog.LevelDebug // as clients do that only ask
		}
		s.opts.Log.Log(ctx, level, "handshake ended", "client", h.client, "err", err)
		return
	}
	c.conn.SetDeadline(time.Time{})
	widen(c.conn)
	c.transmit(h)
}

// transmit runs the transmission phase of what h has negotiated.
func (c *connection) transmit(h *handshake) {
	s, e := c.server, h.export
	l := &lease{release: e.Release}
	defer l.close()
	if !c.register(h, l) {
		return
	}
	log := s.opts.Log.With("export", e.Name, "client", h.client)
	log.Info("connected", "tls", h.tls, "style", h.style.String())

	var watcher sync.WaitGroup
	ended := make(chan struct{})
	watcher.Go(func() {
		select {
		case <-e.Gone:
			l.close()
		case <-ended:
		}
	})
	err := newSession(s, h, l, log).run()
	close(ended)
	watcher.Wait()

	// Over TLS this says good-bye, so that the client knows that nothing was
	// cut off.
	h.conn.Close()
	if err != nil && !errors.Is(err, io.EOF) {
		log.Info("disconnected", "err", err)
		return
	}
	log.Info("disconnected")
}

// register makes the connection known as a client of the export that h chose.
// It returns false if Disconnect was called for that since before it was opened.
func (c *connection) register(h *handshake, l *lease) bool {
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(c.dropped, h.export.Name) {
		return false
	}
	c.dropped = nil
	c.client, c.export, c.lease = h.client, h.export.Name, l
	return true
}

// opening says that the connection, in its handshake, will open an export: who
// was to lose his clients before does not matter.
func (c *connection) opening() {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	c.dropped = nil
}
